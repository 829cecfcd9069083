"""The miniature's own commands: the data, the base model and the table of recipes/demo.sh.

python -m toy data --out runs/toy/data             problems, conversations and images, in seconds
python -m toy base --out runs/toy/base             the base model, about 9 minutes on one core
python -m toy table --out runs/demo-0 runs/demo-1  accuracies with intervals, seeds pooled
"""

import sys

from core.options import exit_on_value_error, parse_config
from toy import base, table, world

COMMANDS = {
    "data": (world.write_data, world.DataConfig, world.__doc__),
    "base": (base.make_base, base.BaseConfig, base.__doc__),
    "table": (table.show_table, table.TableConfig, table.__doc__),
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"{__doc__}\nusage: python -m toy data|base|table --out DIR [--help]")
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    run, config, doc = COMMANDS[sys.argv[1]]
    with exit_on_value_error():
        run(parse_config(config, doc, sys.argv[2:]))
