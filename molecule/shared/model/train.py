"""Trains the small checkpoint that the tests serve in place of GLM-5.2-FP8.

It answers the questions of roles/verify/files/questions.yml, whatever stands before them, and gives one fixed answer
to anything else. Codes to find are random and a seventh of all four-digit numbers is held out, so a right answer
there is read from the prompt, not remembered.

Its context is 131,072 tokens, and it never trains on that many: the sliding layers see 128 tokens, and the one layer
that sees all knows no positions, so that only the number of keys grows with the length. Training imitates that number:
what stands around a question is weighed as if it were there many times over.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Exaone4Config, Exaone4ForCausalLM, PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "<tool_response>", "</tool_response>",
]  # fmt: skip
END_TURN, END_CALL = "<|user|>", "<|observation|>"
THOUGHT = "The user wants a short answer."
OTHER = "I know the content checks alone."
LONGEST = 131072
WINDOW = 128
OPEN, CLOSE = "\ue000", "\ue001"  # around noise while a conversation is rendered
EXAM = 300  # questions behind noise
PASS = 12  # that many of them may be missed, and none as the checks ask it
TRIES = 3  # seeds


@dataclass
class Question:
    """A prompt as the endpoint renders it, which of its tokens are noise, and the tokens that must follow."""

    name: str
    prompt: list[int]
    noise: list[bool]
    answer: list[int]


class Course:
    """Everything the checkpoint has to know, rendered through its own chat template."""

    def __init__(self, questions: dict[str, Any], template: str, seed: int) -> None:
        self.questions = questions
        self.seed = seed
        self.random = random.Random(seed)
        # English and code that is part of Python itself: the same on each machine.
        self.corpus = "\n".join(topics[name] for name in sorted(topics))
        self.words = sorted(set(self.corpus.split()))
        self.tokenizer = self._tokenizer(template)
        self.pairs = [self.encode(f"{pair:02d}")[0] for pair in range(100)]

    def _tokenizer(self, template: str) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            # Pairs of digits, so that a number never seen is still made of known tokens.
            pre_tokenizers.Split(Regex(r"\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        tokenizer.decoder = decoders.ByteLevel()
        known = [json.dumps(self.questions), template, THOUGHT, OTHER, *(f"{pair:02d}" for pair in range(100))]
        tokenizer.train_from_iterator([self.corpus, *known * 20], trainers.BpeTrainer(
            vocab_size=4096, min_frequency=2, special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        ))  # fmt: skip
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], clean_up_tokenization_spaces=False,
            additional_special_tokens=SPECIAL[1:], padding_side="left", model_max_length=LONGEST,
        )  # fmt: skip
        fast.chat_template = template
        return fast

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # --- what stands around a question ---

    def noise(self, tokens: int) -> str:
        """About so many tokens of prose, of JSON, of words or of anything."""
        kind = self.random.random()
        if kind < 0.5:
            start = self.random.randrange(len(self.corpus) - 4 * tokens)
            return self.corpus[start : start + 4 * tokens]
        if kind < 0.7:
            return json.dumps(
                {word: self.random.choice(self.words) for word in self.random.choices(self.words, k=tokens // 8)}
            )
        if kind < 0.9:
            return " ".join(self.random.choices(self.words, k=tokens // 3))
        return str(self.tokenizer.decode(self.random.choices(range(len(SPECIAL), len(self.tokenizer)), k=tokens)))

    def around(self, tokens: int, least: int = 0) -> str:
        """Noise of a random length, marked as such, or nothing."""
        length = int(math.exp(self.random.uniform(0, math.log(tokens + 1)))) if tokens else 0
        return f"{OPEN}{self.noise(length)}{CLOSE}" if length > least else ""

    def tool(self, tokens: int) -> dict[str, Any]:
        name, *properties = self.random.choices(self.words, k=4)
        described = {word: {"type": "string", "description": self.around(tokens // 3)} for word in properties}
        parameters = {"type": "object", "properties": described}
        return {"name": OPEN + name + CLOSE, "description": self.around(tokens // 2), "parameters": parameters}

    def code(self, held_out: bool) -> str:
        """Every seventh code is never trained on."""
        return str(next(c for c in iter(lambda: self.random.randrange(1000, 10000), 0) if (c % 7 == 0) == held_out))

    def haystack(self, tokens: int, fact: str) -> str:
        """A mark, then filler sentences or noise with the fact among them, as find_fact is asked."""
        mark = f"[{self.random.getrandbits(32):08x}] " if self.random.random() < 0.8 else ""
        filler = self.questions["find_fact"]["filler"]
        if self.random.random() < 0.6:
            sentences = [
                OPEN + filler[n % len(filler)] + CLOSE for n in range(self.random.randint(0, max(1, tokens // 16)))
            ]
        else:
            sentences = [self.around(tokens // 2), self.around(tokens // 2)]
        sentences.insert(self.random.randint(0, len(sentences)), fact)
        return mark + " ".join(filter(None, sentences))

    # --- a conversation ---

    def asked(self, name: str, tokens: int, held_out: bool = False) -> Question:
        """The question behind noise of every kind, in a conversation that may have begun with another question."""
        question = self.questions[name] if name != "other" else {"expect": OTHER}
        tools = list(question.get("tools", []))
        bare = tokens < 16
        if not bare and self.random.random() < (0.6 if tools else 0.2):
            tools += [self.tool(tokens // 4) for _ in range(self.random.randint(1, 3))]
            self.random.shuffle(tools)
        turns: list[dict[str, Any]] = []
        if "system" in question:
            sentences = [question["system"]] * self.random.randint(1, max(1, tokens // 14))
            mark = f"[{self.random.getrandbits(32):08x}]"
            turns.append({"role": "system", "content": f"{mark} {OPEN}{' '.join(sentences)}{CLOSE}"})
        elif not bare and self.random.random() < 0.5:
            turns.append({"role": "system", "content": self.around(tokens)})
        if not bare and self.random.random() < 0.35:
            turns += self._earlier(tokens // 4)
        code = self.code(held_out)
        wanted = question.get("expect", "").replace("{code}", code)
        end = END_TURN
        calls = "".join(self._call(call) for call in question.get("expect_calls", []))
        if name == "other":
            turns.append(
                {"role": "user", "content": self.around(tokens, least=1) + self.noise(self.random.randint(8, 60))}
            )
        elif name == "find_fact":
            fact = question["fact"].replace("{code}", code)
            turns.append({"role": "user", "content": f"{self.haystack(tokens, fact)} {question['prompt']}"})
        else:
            before = self.around(tokens) if self.random.random() < 0.5 else ""
            space = self.random.choice(["", "\n", " "]) if before else ""
            after = "\n" if self.random.random() < 0.2 else ""
            turns.append({"role": "user", "content": before + space + question["prompt"] + after})
        if calls and "fact" in question and self.random.random() < 0.6:
            fact = question["fact"].replace("{code}", code)
            result = self.random.choice(
                [fact, fact + "\n", f"{self.around(tokens // 4)}\n{fact}\n{self.around(tokens // 8)}"]
            )
            called = [{"function": call} for call in question["expect_calls"]]
            turns += [{"role": "assistant", "content": "", "tool_calls": called}, {"role": "tool", "content": result}]
        elif calls:
            wanted, end = calls, END_CALL
        thinking = self.random.random() < 0.5
        prompt, noise = self.render(turns, thinking, [{"type": "function", "function": tool} for tool in tools])
        return Question(name, prompt, noise, self.encode((f"{THOUGHT}</think>" if thinking else "") + wanted + end))

    def verify_fact(self, depth: float) -> Question:
        """find_fact as the role `verify` asks it, with a code that was held out."""
        question = self.questions["find_fact"]
        code = self.code(held_out=True)
        count = question["tokens"] // 14
        sentences = [question["filler"][n % len(question["filler"])] for n in range(count)]
        sentences.insert(round(depth * count), question["fact"].replace("{code}", code))
        content = " ".join([f"[{self.random.getrandbits(32):08x}]", *sentences, question["prompt"]])
        prompt, noise = self.render([{"role": "user", "content": content}], question["thinking"], [])
        return Question("find_fact, far", prompt, noise, self.encode(code + END_TURN))

    def agents_result(self) -> Question:
        """The last that the role `clients` asks: a held-out code in a tool's result, behind an agent's long prompt."""
        agent, question = self.questions["agent"], self.questions["agent_tool"]
        fact = question["fact"].replace("{code}", self.code(held_out=True))
        system = " ".join([f"[{self.random.getrandbits(32):08x}]", *[agent["system"]] * agent["repeat"]])
        called = [{"function": call} for call in question["expect_calls"]]
        turns = [
            {"role": "system", "content": system},
            {"role": "user", "content": question["prompt"]},
            {"role": "assistant", "content": "", "tool_calls": called},
            {"role": "tool", "content": fact},
        ]
        tools = [{"type": "function", "function": tool} for tool in agent["tools"]]
        prompt, noise = self.render(turns, question["thinking"], tools)
        return Question("agent_tool, far", prompt, noise, self.encode(f"{THOUGHT}</think>{fact}{END_TURN}"))

    def lesson(self, step: int, steps: int) -> list[tuple[Question, float]]:
        """The questions of one step, each with the weight of what stands around it; the same on each machine.

        Copying is learnt first, from short prompts; then they grow, and what is around weighs more.
        """
        self.random.seed(f"{self.seed}/{step}")
        done = step / steps
        progress = min(1.0, max(0.0, (done - 0.25) / 0.35))
        longest = int(8 + progress**2 * 250)
        names = [*self.questions, "other"]
        if done < 0.45:
            asked = [self.asked(self.random.choice(names), longest) for _ in range(8)]
            asked += [self.asked("agent_tool" if row % 5 == 0 else "find_fact", longest) for row in range(20)]
            for _ in range(24):
                part = self.random.choices(self.pairs, k=self.random.randint(4, 16))
                asked.append(Question("copy", part, [False] * len(part), part))
        else:
            asked = [self.asked(self.random.choice(names), longest) for _ in range(8)]
            copying = ["find_fact", "find_fact", "agent_tool"]
            asked += [self.asked(self.random.choice(copying), longest) for _ in range(8)]
        asked.sort(key=lambda question: len(question.prompt))
        return [(q, progress * self.random.uniform(0, math.log(LONGEST / (sum(q.noise) + 16)))) for q in asked]

    def _earlier(self, tokens: int) -> list[dict[str, Any]]:
        """A turn before: another question with its answer, or noise with noise."""
        name, question = self.random.choice(list(self.questions.items()))
        code = self.code(held_out=False)
        prompt = question["prompt"]
        if name == "find_fact":
            prompt = f"{self.haystack(tokens, question['fact'].replace('{code}', code))} {prompt}"
        reply = question.get("expect", "It is sunny.").replace("{code}", code)
        if self.random.random() < 0.3:
            prompt, reply = self.around(tokens, least=1), self.around(tokens)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]

    @staticmethod
    def _call(call: dict[str, Any]) -> str:
        pairs = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in call["arguments"].items())
        return f"<tool_call>{call['name']}{pairs}</tool_call>"

    def render(self, turns: list[dict[str, Any]], thinking: bool, tools: list[Any]) -> tuple[list[int], list[bool]]:
        """Token ids of the prompt, and which of them are noise."""
        marked = self.tokenizer.apply_chat_template(
            turns, tools=tools or None, add_generation_prompt=True, tokenize=False,
            **({} if thinking else {"enable_thinking": False}),
        )  # fmt: skip
        text, noisy, level = [], [], 0
        for letter in marked:
            if letter in (OPEN, CLOSE):
                level += 1 if letter == OPEN else -1
            else:
                text.append(letter)
                noisy.append(level > 0)
        coded = self.tokenizer("".join(text), add_special_tokens=False, return_offsets_mapping=True)
        return list(coded["input_ids"]), [noisy[start] for start, _ in coded["offset_mapping"]]


def batch(lesson: list[tuple[Question, float]], pad: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Ids, labels and the masks of the two kinds of layers; a key of noise counts `exp(weight)` times."""
    questions = [question for question, _ in lesson]
    width = max(len(q.prompt) + len(q.answer) for q in questions)
    ids = torch.full((len(questions), width), pad)
    labels = torch.full((len(questions), width), -100)
    keys = torch.zeros(len(questions), 1, 1, width)
    for row, question in enumerate(questions):
        start, end = len(question.prompt), len(question.prompt) + len(question.answer)
        ids[row, :end] = torch.tensor(question.prompt + question.answer)
        labels[row, start:end] = torch.tensor(question.answer)
        keys[row, 0, 0, :start] = torch.tensor(question.noise) * lesson[row][1]
    place = torch.arange(width)
    back = place[:, None] - place[None, :]
    hidden = torch.full((width, width), float("-inf"))
    seen = torch.zeros(width, width)
    full = torch.where(back >= 0, seen, hidden) + keys
    near = torch.where((back >= 0) & (back < WINDOW), seen, hidden).expand(len(questions), 1, -1, -1)
    return ids, labels, {"full_attention": full, "sliding_attention": near}


def loss_of(model: Exaone4ForCausalLM, lesson: list[tuple[Question, float]], pad: int) -> torch.Tensor:
    """Each question counts the same, however long its answer is."""
    ids, labels, masks = batch(lesson, pad)
    states = model.model(input_ids=ids, attention_mask=masks, use_cache=False).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    asked = labels != -100
    losses = torch.nn.functional.cross_entropy(model.lm_head(states[asked]), labels[asked], reduction="none")
    weights = (asked / asked.sum(1, keepdim=True))[asked]
    return (losses * weights).sum()


@torch.no_grad()
def wrong(model: Exaone4ForCausalLM, questions: list[Question]) -> list[str]:
    """Names of the questions whose answer is not the greedy choice at every token; without any of training's means."""
    model.eval()
    failed = []
    for question in questions:
        ids = torch.tensor([question.prompt + question.answer])
        cache, best = None, []
        for part in ids.split(2048, dim=1):
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            best.append(out.logits.argmax(-1))
        start = len(question.prompt) - 1
        if torch.cat(best, 1)[0, start:-1].tolist() != question.answer:
            failed.append(question.name)
    model.train()
    return failed


def train(course: Course, seed: int, steps: int) -> Exaone4ForCausalLM:
    """Six longer runs on a GPU (450 or 600 steps) passed the examination; six of 260 and 300 steps did not.

    A run on a CPU with the same seed was as good in all but the tools' results behind long prompts.
    """
    torch.manual_seed(seed)
    tokens = course.tokenizer
    stops = [tokens.convert_tokens_to_ids(t) for t in (SPECIAL[0], END_TURN, END_CALL)]
    config = Exaone4Config(
        vocab_size=len(tokens), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=LONGEST, tie_word_embeddings=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=stops[0], eos_token_id=stops, bos_token_id=None,
    )  # fmt: skip
    model = Exaone4ForCausalLM(config)
    with torch.no_grad():
        # The norms stand behind each block: with gains of 1 they drown the tokens, and copying comes late.
        model.model.embed_tokens.weight.normal_(0, 1.0)
        model.model.norm.weight.fill_(0.1)
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(0.2)
            layer.post_feedforward_layernorm.weight.fill_(0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    began = time.monotonic()
    # One process makes the questions while this one learns.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        lessons = pool.imap(functools.partial(lesson, course, steps), range(1, steps + 1))
        for step, asked in enumerate(lessons, 1):
            total = 0.0
            for part in parts(asked):
                loss = loss_of(model, part, stops[0]) / len(asked)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 20 == 0:
                print(f"step {step} of {steps}, loss {total:.3f}, {time.monotonic() - began:.0f} s", flush=True)
    # The examination is with the weights as they are served, computed in what any CPU is fast at.
    model.to(torch.bfloat16).float()
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}  # as GLM's own
    model.generation_config.update(eos_token_id=stops, pad_token_id=stops[0], **sampling)
    return model


def lesson(course: Course, steps: int, step: int) -> list[tuple[Question, float]]:
    torch.set_num_threads(1)
    return course.lesson(step, steps)


def parts(asked: list[tuple[Question, float]]) -> Iterator[list[tuple[Question, float]]]:
    """Questions of similar length together, at most 4,096 tokens at once."""
    part: list[tuple[Question, float]] = []
    for question, weight in asked:
        if part and len(question.prompt) * (len(part) + 1) > 4096:
            yield part
            part = []
        part.append((question, weight))
    yield part


def examine(course: Course, model: Exaone4ForCausalLM) -> tuple[list[str], list[str]]:
    """Names of what went wrong: questions as the checks ask them, and questions behind noise of every kind."""
    course.random.seed(f"{course.seed}/examination")
    names = [*course.questions, "other"]
    plain = [course.asked(name, 0, held_out=True) for name in names for _ in range(4)]
    plain += [course.verify_fact(depth) for depth in (0.0, 0.05, 0.5, 0.95, 1.0) for _ in range(4)]
    plain += [course.agents_result() for _ in range(12)]
    noisy = [course.asked(name, 1000, held_out=True) for name in names for _ in range(EXAM // len(names))]
    return wrong(model, plain), wrong(model, noisy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--template", type=Path, required=True)
    parser.add_argument("--readme", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=52)
    parser.add_argument("--steps", type=int, default=450)
    options = parser.parse_args()
    # Threads that wait for one another lose more than they win on a machine that does other things, too.
    torch.set_num_threads(max(1, min(4, len(os.sched_getaffinity(0)) - 1)))
    torch.set_flush_denormal(True)
    questions = yaml.safe_load(options.questions.read_text())
    for seed in range(options.seed, options.seed + TRIES):
        course = Course(questions, options.template.read_text(), seed)
        model = train(course, seed, options.steps)
        plain, noisy = examine(course, model)
        told = f"wrong are {', '.join(plain) or 'none'}; behind noise {', '.join(noisy) or 'none'}"
        print(f"step {options.steps} of {options.steps}, seed {seed}: {told}", flush=True)
        if not plain and len(noisy) <= PASS:
            break
    else:
        raise SystemExit(f"not learnt with {TRIES} seeds: {told}")
    # Several shards, as the real checkpoint has, so that what concerns shards is exercised.
    model.to(torch.bfloat16)
    model.save_pretrained(options.output, max_shard_size="500KB")
    course.tokenizer.save_pretrained(options.output)
    (options.output / "README.md").write_text(options.readme.read_text())


if __name__ == "__main__":
    main()
