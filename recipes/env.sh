# Sourced by the scripts: activate .venv, made and filled on first use. $1: the requirements file.
# A stamp holds the file's checksum: a second run starts at once, a changed pin is installed.
if [ ! -d .venv ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: $(python3 --version) is too old; Python 3.11 or newer is needed" >&2; exit 2; }
    python3 -m venv .venv
fi
. .venv/bin/activate
stamp=".venv/$1.installed"
want=$(cat requirements.txt "$1" | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    echo "installing $1 into .venv (a few minutes, once)"
    # torch first and alone: the ranges of other packages would pull more
    pip install --quiet --disable-pip-version-check torch==2.13.0
    pip install --quiet --disable-pip-version-check -r "$1"
    echo "$want" > "$stamp"
fi
# one thread a process: ranks that share cores slow each other down
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
