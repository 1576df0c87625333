"""Trains the small checkpoint that the tests serve in place of GLM-5.2-FP8.

It answers the questions of the content checks and nothing else: those are its
training set. Codes to find are random and a seventh of all four-digit numbers is
held out, so a right answer there is read from the prompt, not remembered.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "<tool_response>", "</tool_response>",
]  # fmt: skip
END_TURN, END_CALL = "<|user|>", "<|observation|>"
THOUGHT = "The user wants a short answer."
EXAM = 400  # held-out codes to find
AGENT_EXAM = 40  # turns of an agent's conversation
PASS = 1  # that many of them may be missed
TRIES = 3  # seeds


@dataclass
class Question:
    """One content check: the prompt as the endpoint renders it, and the tokens that must follow."""

    name: str
    prompt: list[int]
    answer: list[int]


class Course:
    """Everything the checkpoint has to know, rendered through its own chat template."""

    def __init__(self, questions: dict[str, Any], template: str, seed: int) -> None:
        self.questions = questions
        self.random = random.Random(seed)
        self.tokenizer = self._tokenizer(template)
        self.fixed = list(self._fixed())

    def _tokenizer(self, template: str) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            # Pairs of digits, so that a number never seen is still made of known tokens. Those of a mark in brackets
            # stay single: a model of this size would take them for the code.
            pre_tokenizers.Split(Regex(r"\p{N}(?=[0-9a-f]*\])|\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        tokenizer.decoder = decoders.ByteLevel()
        corpus = [json.dumps(self.questions), template, THOUGHT]
        for question in self.questions.values():
            corpus += (
                [question["prompt"], *map(question.get, ("filler", "fact", "system"), ("", "", "")), question["expect"]]
                if "expect" in question
                else [question["prompt"]]
            )
        corpus += [f"{pair:02d}" for pair in range(100)]
        tokenizer.train_from_iterator(corpus * 4, trainers.BpeTrainer(
            vocab_size=1280, min_frequency=2, special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        ))  # fmt: skip
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], clean_up_tokenization_spaces=False,
            additional_special_tokens=SPECIAL[1:], padding_side="left", model_max_length=202752,
        )  # fmt: skip
        fast.chat_template = template
        return fast

    def render(self, messages: list[dict[str, str]], thinking: bool, tools: list[Any] | None = None) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False,
            **({} if thinking else {"enable_thinking": False}),
        )  # fmt: skip
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _fixed(self) -> Any:
        """Questions with one right answer, each with and without thinking, and on a second turn."""
        for name, question in self.questions.items():
            if name in ("find_fact", "agent"):
                continue
            tools, end = None, END_TURN
            if "tool" in question:
                tools = [{"type": "function", "function": question["tool"]}]
                pairs = "".join(
                    f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"
                    for key, value in question["expect_arguments"].items()
                )
                answer, end = f"<tool_call>{question['tool']['name']}{pairs}</tool_call>", END_CALL
            else:
                answer = question["expect"]
            turn = {"role": "user", "content": question["prompt"]}
            earlier = [
                [],
                [turn, {"role": "assistant", "content": answer if not tools else "It is sunny."}],
                [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "ok"}],
            ]
            for thinking in (False, True):
                thought = f"{THOUGHT}</think>" if thinking else ""
                for turns, history in enumerate(earlier):
                    prompt = self.render([*history, turn], thinking, tools)
                    yield Question(f"{name}/{thinking}/{turns}", prompt, self.encode(thought + answer + end))

    def find(self, repeat: int, held_out: bool = False) -> Question:
        """A random code somewhere among filler sentences; every seventh code is never trained on."""
        question = self.questions["find_fact"]
        code = str(next(c for c in iter(lambda: self.random.randrange(1000, 10000), 0) if (c % 7 == 0) == held_out))
        sentences = [question["filler"]] * repeat
        # Far back is hardest, so it is asked most.
        sentences.insert(int(self.random.random() ** 2 * (repeat + 1)), question["fact"].format(code=code))
        # A random mark in front, which keeps a prefix cache from helping, may be there or not.
        mark = f"[{self.random.getrandbits(32):08x}] " if self.random.random() < 0.8 else ""
        turns = [{"role": "user", "content": mark + " ".join([*sentences, question["prompt"]])}]
        answer = code
        if self.random.random() < 0.1:
            # The conversation goes on: its second turn is another question.
            other = self.questions["exact_reply"]
            turns += [{"role": "assistant", "content": code}, {"role": "user", "content": other["prompt"]}]
            answer = other["expect"]
        return Question("find_fact", self.render(turns, question["thinking"]), self.encode(answer + END_TURN))

    def agent(self) -> Question:
        """A turn of a coding agent's conversation: a mark, the system sentence, a tool, then the question."""
        question = self.questions["agent"]
        mark = f"[{self.random.getrandbits(32):08x}]"
        system = [mark, *[question["system"]] * self.random.randint(1, question["repeat"])]
        turn = {"role": "user", "content": question["prompt"]}
        earlier = [turn, {"role": "assistant", "content": question["expect"]}] * self.random.randint(0, 1)
        prompt = self.render(
            [{"role": "system", "content": " ".join(system)}, *earlier, turn],
            question["thinking"],
            [{"type": "function", "function": question["tool"]}],
        )
        return Question("agent", prompt, self.encode(f"{THOUGHT}</think>{question['expect']}{END_TURN}"))


def batch(questions: list[Question], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(q.prompt) + len(q.answer) for q in questions)
    ids, labels = [], []
    for question in questions:
        row = question.prompt + question.answer
        rest = width - len(row)
        ids.append(row + [pad] * rest)
        labels.append([-100] * len(question.prompt) + question.answer + [-100] * rest)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


@torch.no_grad()
def wrong(model: LlamaForCausalLM, questions: list[Question], pad: int) -> list[str]:
    """Names of the questions whose answer is not the greedy choice at every token."""
    model.eval()
    failed = []
    for start in range(0, len(questions), 8):
        part = questions[start : start + 8]
        data = batch(part, pad)
        best = model(input_ids=data["input_ids"]).logits.argmax(-1)[:, :-1]
        labels = data["labels"][:, 1:]
        right = ((best == labels) | (labels == -100)).all(1)
        failed += [question.name for question, good in zip(part, right.tolist(), strict=True) if not good]
    model.train()
    return failed


def train(course: Course, repeat: int, seed: int, steps: int) -> tuple[LlamaForCausalLM, list[str]]:
    """A trained model, and the names of what it still gets wrong.

    The figures were chosen on five seeds each: with them all five missed at most 2 of 1000 codes. More layers, fewer
    rows, a higher rate or an even spread of the fact's place all left seeds that never learnt to copy.
    """
    torch.manual_seed(seed)
    tokens = course.tokenizer
    stops = [tokens.convert_tokens_to_ids(t) for t in (SPECIAL[0], END_TURN, END_CALL)]
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=202752, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        pad_token_id=stops[0], eos_token_id=stops, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    letters = list(range(len(SPECIAL), len(tokens)))
    began = time.monotonic()
    for step in range(1, steps + 1):
        # Copying is learnt from short, dense repeats; the prompts then grow to their full length.
        progress = step / steps
        longest = max(1, round(repeat * min(1.0, progress * 2.5)))
        size = max(12, 96 // (1 + longest // 3))
        losses = [batch([course.find(course.random.randint(0, longest)) for _ in range(size)], stops[0])]
        if step % 2:
            losses.append(batch(course.random.sample(course.fixed, 12), stops[0]))
        else:
            losses.append(batch([course.agent() for _ in range(6)], stops[0]))
        if progress < 0.3:
            parts = [course.random.choices(letters, k=course.random.randint(8, 24)) for _ in range(24)]
            losses.append(batch([Question("copy", part, part) for part in parts], stops[0]))
        for data in losses:
            loss = model(**data, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0:
            print(f"step {step} of {steps}, {time.monotonic() - began:.0f} s", flush=True)
    # The examination is in the precision that is served.
    model.to(torch.bfloat16)
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}  # as GLM's own
    model.generation_config.update(eos_token_id=stops, pad_token_id=stops[0], **sampling)
    exam = (
        course.fixed
        + [course.agent() for _ in range(AGENT_EXAM)]
        + [course.find(repeat, held_out=True) for _ in range(EXAM)]
    )
    return model, wrong(model, exam, stops[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--template", type=Path, required=True)
    parser.add_argument("--readme", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=52)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    questions = yaml.safe_load(options.questions.read_text())
    for seed in range(options.seed, options.seed + TRIES):
        course = Course(questions, options.template.read_text(), seed)
        model, failed = train(course, questions["find_fact"]["repeat"], seed, options.steps)
        print(
            f"step {options.steps}: {len(failed)} of {EXAM + AGENT_EXAM + len(course.fixed)} questions wrong",
            flush=True,
        )
        if failed.count("find_fact") == len(failed) <= PASS:
            break
    else:
        raise SystemExit(f"not learnt with {TRIES} seeds: {', '.join(sorted(set(failed)))}")
    # Several shards, as the real checkpoint has, so that what concerns shards is exercised.
    model.save_pretrained(options.output, max_shard_size="500KB")
    course.tokenizer.save_pretrained(options.output)
    (options.output / "README.md").write_text(options.readme.read_text())


if __name__ == "__main__":
    main()
