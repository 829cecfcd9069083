"""Talk to a model: answers are streamed from the project's own sampler, thoughts are dimmed.

    python -m tools.chat --model runs/grpo/final
    python -m tools.chat --model Qwen/Qwen2.5-VL-7B-Instruct --image figure.png --think_budget 512
    python -m tools.chat --model DIR --prompt "What is 6·7?"     one answer, for scripts

Ctrl-C stops an answer, Ctrl-D ends. /image FILE adds an image to your next message, /new forgets
the conversation. Every turn is sampled from the whole conversation, thoughts included. The model
sees your words alone: to see what it was trained for, put data.INSTRUCTIONS["train"] before them.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import torch

import data
from core.chat import banned_token_ids, chat_message, opens_thought, stop_token_ids
from core.images import ImageConfig
from core.options import DATA, MEMORY, SAMPLING, exit_on_value_error, parse_config
from core.parallel import gathered, init
from core.slots import ForcedExit
from model import ModelConfig, build_model, resolve_model_dir
from sampler import Sampler, SamplingParams


@dataclass
class Config:
    model: str = DATA(MISSING, "model directory or hub id")
    prompt: str = DATA("", "print the answer to this message and end")
    image: list[str] = DATA([], "images of the first message")
    system: str = DATA("", "system prompt, instead of the chat template's own")
    temperature: float = SAMPLING(0.6, "0: greedy", ge=0)
    think_budget: int = SAMPLING(0, "end a thought after n tokens; 0: never", ge=0)
    max_new_tokens: int = SAMPLING(4096, "longest answer", ge=1)
    context: int = MEMORY(16384, "longest conversation, in tokens", ge=1)
    device: Literal["auto", "cpu", "cuda"] = MEMORY("auto", "where to run")


class Chat:
    """A model and a conversation with it."""

    def __init__(self, config: Config):
        world = init(config.device)
        folder = resolve_model_dir(config.model, world)
        self.config, self.tokenizer = config, data.load_tokenizer(folder)
        vision = ModelConfig.from_dir(folder).vision is not None
        self.images = ImageConfig.from_dir(folder) if vision else None
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        options = dict(with_vision=vision, compute_dtype=dtype, master_dtype=dtype)
        self.model = build_model(folder, world, **options)
        vocab = self.model.config.vocab_size
        self.model.set_banned_ids(banned_token_ids(self.tokenizer, vocab))
        self.stop, budget = stop_token_ids(self.tokenizer), config.think_budget
        self.exit = budget and ForcedExit.from_tokenizer(self.tokenizer, vocab, budget) or None
        self.sampler = Sampler(self.model, max_len=config.context, slots=1)
        self.new()

    def new(self) -> None:
        """Forget the conversation, but not the system prompt."""
        system = self.config.system
        self.messages = [{"role": "system", "content": system}] if system else []
        self.files: list[str] = []

    def prompt(self) -> data.Prompt:
        """The conversation in the model's chat template, with all its images."""
        chat = [chat_message(m, self.tokenizer) for m in self.messages]
        tokens = data.chat_tokens(chat, self.files, self.tokenizer, self.images)
        return data.Prompt(tokens, *data.load_images(self.files, self.images))

    def say(self, text: str, files: list[str]) -> str:
        """Send a message with images, print the answer while it comes, and return it."""
        before, c = (self.messages, self.files), self.config
        content = "<image>\n" * len(files) + text
        self.messages = [*self.messages, {"role": "user", "content": content}]
        self.files = [*self.files, *files]
        try:
            prompt = self.prompt()
            if (room := min(c.max_new_tokens, c.context - len(prompt.tokens))) < 1:
                raise ValueError(f"the conversation is longer than --context {c.context}; /new")
            params = SamplingParams(
                max_new_tokens=room, temperature=c.temperature, stop_ids=self.stop,
                seed=len(self.messages), forced_exit=self.exit,
            )  # fmt: skip
            answer = self.stream(prompt, params)
        except ValueError:
            self.messages, self.files = before
            raise
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def stream(self, prompt: data.Prompt, params: SamplingParams) -> str:
        """Sample one answer and print it as it grows; Ctrl-C keeps what there is."""
        text, printed, opened = "", 0, opens_thought(self.tokenizer)

        def show() -> None:
            nonlocal text, printed
            slots = self.sampler.slots
            tokens = slots.tokens[0, : int(slots.count[0])].tolist()
            text = self.tokenizer.decode(tokens[:-1] if tokens[-1] in self.stop else tokens)
            whole = text.rstrip("\ufffd")  # but for the first bytes of an unfinished character
            thinking = (opened or "<think>" in whole) and "</think>" not in whole
            dim = "\033[2m{}\033[0m" if thinking and sys.stdout.isatty() else "{}"
            print(dim.format(whole[printed:]), end="", flush=True)
            printed = max(printed, len(whole))

        try:
            with gathered(self.model):
                self.sampler.generate([prompt], params, on_step=show)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        return text


def converse(chat: Chat) -> None:
    """Turns from the keyboard until Ctrl-D."""
    files = list(chat.config.image)
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
    with exit_on_value_error():
        config = parse_config(Config, __doc__, argv)
        chat = Chat(config)
        chat.say(config.prompt, config.image) if config.prompt else converse(chat)


if __name__ == "__main__":
    main()
