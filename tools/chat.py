"""Talk to a model: answers are streamed from the project's own sampler, thoughts are dimmed.

    python -m tools.chat --model runs/grpo/final
    python -m tools.chat --model Qwen/Qwen2.5-VL-7B-Instruct --image figure.png --think_budget 512
    python -m tools.chat --model DIR --prompt "What is 6·7?"     one answer, for scripts

Ctrl-C stops an answer, Ctrl-D ends. /image FILE adds an image to your next message, /new forgets
the conversation. Every turn is sampled from the whole conversation, thoughts included.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import data
from core.chat import banned_token_ids, chat_message, opens_thought, stop_token_ids
from core.images import ImageConfig
from core.options import exit_on_value_error
from core.parallel import gathered, init
from core.slots import ForcedExit
from model import ModelConfig, build_model, resolve_model_dir
from sampler import Sampler, SamplingParams

OPTIONS = {
    "system": ("", "system prompt, instead of the chat template's own"),
    "temperature": (0.6, "0: greedy"),
    "think_budget": (0, "end a thought after n tokens; 0: never"),
    "max_new_tokens": (4096, "longest answer"),
    "context": (16384, "longest conversation, in tokens"),
    "device": ("auto", "auto, cpu or cuda"),
}


class Stream:
    """Prints a text that grows; its thought, up to </think>, is dimmed where `colour`."""

    def __init__(self, opened: bool, colour: bool):
        """opened: the prompt ends in <think>, so the text begins inside a thought."""
        self.opened, self.colour, self.printed = opened, colour, 0

    def show(self, text: str) -> None:
        """Print what is new, but for the first bytes of a character that is not whole yet."""
        start, end = text.lstrip()[:7], len(text.rstrip("\ufffd"))
        edge = 0
        if self.opened or "<think>".startswith(start):  # true of its first tokens, too
            edge = len(text.partition("</think>")[0]) + len("</think>")
        edge = min(max(edge, self.printed), end)
        if (dim := text[self.printed : edge]) and self.colour:
            dim = f"\033[2m{dim}\033[0m"
        print(dim + text[edge:end], end="", flush=True)
        self.printed = max(end, self.printed)


class Chat:
    """A model and a conversation with it."""

    def __init__(self, args: argparse.Namespace):
        world = init(args.device)
        folder = resolve_model_dir(args.model, world)
        self.args, self.tokenizer = args, data.load_tokenizer(folder)
        vision = ModelConfig.from_dir(folder).vision is not None
        self.images = ImageConfig.from_dir(folder) if vision else None
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        options = dict(with_vision=vision, compute_dtype=dtype, master_dtype=dtype)
        self.model = build_model(folder, world, **options)
        vocab = self.model.config.vocab_size
        self.model.set_banned_ids(banned_token_ids(self.tokenizer, vocab))
        self.stop, budget = stop_token_ids(self.tokenizer), args.think_budget
        self.exit = budget and ForcedExit.from_tokenizer(self.tokenizer, vocab, budget) or None
        self.sampler = Sampler(self.model, max_len=args.context, slots=1)
        self.new()

    def new(self) -> None:
        """Forget the conversation, but not the system prompt."""
        system = self.args.system
        self.messages = [{"role": "system", "content": system}] if system else []
        self.files: list[str] = []

    def prompt(self) -> data.Prompt:
        """The conversation in the model's chat template, with all its images."""
        if self.files and self.images is None:
            raise ValueError(f"{self.args.model}: takes no images")
        chat = [chat_message(m, self.tokenizer) for m in self.messages]
        render = self.tokenizer.apply_chat_template
        text = render(chat, tokenize=False, add_generation_prompt=True)
        tokens = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        counts = data.image_counts({"images": self.files}, self.images)
        repeats = data.expand_images(tokens, counts, data.image_token_id(self.tokenizer))
        images = data.load_images(self.files, self.images)
        return data.Prompt(tokens.repeat(repeats).tolist(), *images)

    def say(self, text: str, files: list[str]) -> str:
        """Send a message with images, print the answer while it comes, and return it."""
        before, a = (self.messages, self.files), self.args
        content = "<image>\n" * len(files) + text
        self.messages = [*self.messages, {"role": "user", "content": content}]
        self.files = [*self.files, *files]
        try:
            prompt = self.prompt()
            if (room := min(a.max_new_tokens, a.context - len(prompt.tokens))) < 1:
                raise ValueError(f"the conversation is longer than --context {a.context}; /new")
            params = SamplingParams(
                max_new_tokens=room, temperature=a.temperature, stop_ids=self.stop,
                seed=len(self.messages), forced_exit=self.exit,
            )  # fmt: skip
            answer = self.stream(prompt, params)
        except ValueError:
            self.messages, self.files = before
            raise
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def stream(self, prompt: data.Prompt, params: SamplingParams) -> str:
        """Sample one answer and print it; Ctrl-C keeps what there is."""
        printer, text = Stream(opens_thought(self.tokenizer), sys.stdout.isatty()), ""

        def show() -> None:
            nonlocal text
            slots = self.sampler.slots
            tokens = slots.tokens[0, : int(slots.count[0])].tolist()
            text = self.tokenizer.decode(tokens[:-1] if tokens[-1] in self.stop else tokens)
            printer.show(text)

        try:
            with gathered(self.model):
                self.sampler.generate([prompt], params, on_step=show)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        return text


def converse(chat: Chat) -> None:
    """Turns from the keyboard until Ctrl-D."""
    files = list(chat.args.image)
    while True:
        try:
            line = input("> ").strip()
            if line == "/new":
                chat.new()
            elif line.startswith("/image ") and Path(line[7:]).is_file():
                files.append(line[7:])
            elif line.startswith("/"):
                print(f"no such command or file: {line}; there are /image FILE and /new")
            elif line:
                chat.say(line, files)
                files = []
        except ValueError as e:
            print(f"error: {e}")
        except KeyboardInterrupt:  # at the keyboard; during an answer, `stream` takes it
            print()
        except EOFError:
            return print()


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.chat", None, __doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, help="model directory or hub id")
    parser.add_argument("--image", nargs="+", default=[], help="images of the first message")
    parser.add_argument("--prompt", help="print the answer to this message and end")
    for name, (default, text) in OPTIONS.items():
        kind = dict(type=type(default), default=default)
        parser.add_argument(f"--{name}", help=f"{text} (default: {default or 'none'})", **kind)
    args = parser.parse_args(argv)
    with exit_on_value_error():
        chat = Chat(args)
        chat.say(args.prompt, args.image) if args.prompt is not None else converse(chat)


if __name__ == "__main__":
    main()
