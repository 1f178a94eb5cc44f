"""Trains the four example adapters on a CPU and writes them to examples/store.

    python examples/train.py [TASK ...]

Each adapter is saved as PEFT saves it, with a task.json beside it that names its labels; how well
it does on the held-out rows goes to examples/accuracy.json.

Recipes close to those in TASKS were compared by cross-validation over the training rows alone. The
held-out rows are read once an adapter is trained and saved, and never to choose anything.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # The base lies on the disk: nothing may be fetched.

import torch
import transformers
from base import BASE_ID, BASE_SHA256, base_path
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parent
ACCURACY = EXAMPLES / "accuracy.json"
SEED = 7
THREADS = 2  # Fixed, since it decides in which order sums are taken and so their last bits.
MAX_LENGTH = 128
BATCH = 16
WARM_UP = 0.1  # of all steps
HEAD_PACE = 5.0  # The head starts from noise, so it learns at so many times the rate.


@dataclass(frozen=True)
class Task:
    """The recipe of one adapter."""

    labels: tuple[str, ...]
    rank: int
    targets: tuple[str, ...] | str
    epochs: int
    rate: float = 1e-3
    rslora: bool = False
    multi_label: bool = False

    @property
    def problem_type(self) -> str:
        """The name that transformers has for this kind of task."""
        return f"{'multi' if self.multi_label else 'single'}_label_classification"


TOPICS = ("business", "entertainment", "health", "politics", "science", "sports")
ASPECTS = ("price", "quality", "delivery", "service")
TASKS = {
    "sentiment": Task(("Negative", "Positive"), 8, ("query", "value"), 5),
    "topic": Task(TOPICS, 4, "all-linear", 6),
    "spam": Task(("ham", "spam"), 4, ("query", "key", "value"), 8, rslora=True),
    "aspects": Task(ASPECTS, 6, ("query", "value", "intermediate.dense"), 10, multi_label=True),
}


@dataclass(frozen=True)
class Rows:
    """Texts, and for each a row of targets that is 1 at every label the text has."""

    texts: list[str]
    targets: Tensor

    def __getitem__(self, index: Tensor) -> "Rows":
        """Returns the rows at these positions."""
        return Rows([self.texts[i] for i in index.tolist()], self.targets[index])


def read(name: str, labels: tuple[str, ...]) -> Rows:
    """Returns the rows of a file of examples/data."""
    with (EXAMPLES / "data" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    held = [row["labels"] if "labels" in row else [row["label"]] for row in rows]
    targets = [[float(label in some) for label in labels] for some in held]
    return Rows([row["text"] for row in rows], torch.tensor(targets))


def batches(rows: Rows) -> list[Tensor]:
    """Splits the rows at random into batches of like lengths, as padding costs as much as text."""
    lengths = torch.tensor([len(text) for text in rows.texts])
    split = (lengths * (1 + 0.3 * torch.rand(len(lengths)))).argsort().split(BATCH)
    return [split[i] for i in torch.randperm(len(split)).tolist()]


class Trainee:
    """The base with one fresh adapter, which the seed alone decides."""

    def __init__(self, task: Task) -> None:
        torch.manual_seed(SEED)
        self.task = task
        self.tokenizer = AutoTokenizer.from_pretrained(base_path())
        base = AutoModelForSequenceClassification.from_pretrained(
            base_path(), num_labels=len(task.labels), problem_type=task.problem_type
        )
        lora = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=task.rank,
            lora_alpha=2 * task.rank,
            target_modules=task.targets if isinstance(task.targets, str) else list(task.targets),
            use_rslora=task.rslora,
        )
        self.model = get_peft_model(base, lora)

    def logits(self, rows: Rows) -> Tensor:
        """Returns a row of logits for each row."""
        inputs = self.tokenizer(
            rows.texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
        )
        logits: Tensor = self.model(**inputs).logits
        return logits

    def loss(self, rows: Rows) -> Tensor:
        """Returns the mean loss over the rows."""
        if self.task.multi_label:
            return functional.binary_cross_entropy_with_logits(self.logits(rows), rows.targets)
        return functional.cross_entropy(self.logits(rows), rows.targets)

    def fit(self, rows: Rows) -> float:
        """Trains the adapter and returns the mean loss of the last epoch."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        rates = [self.task.rate * (HEAD_PACE if "classifier" in name else 1) for name in trained]
        optimizer = torch.optim.AdamW(
            {"params": [p], "lr": rate} for p, rate in zip(trained.values(), rates, strict=True)
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=rates,
            total_steps=self.task.epochs * len(batches(rows)),
            pct_start=WARM_UP,
            anneal_strategy="linear",
            cycle_momentum=False,
        )
        self.model.train()
        for _ in range(self.task.epochs):
            losses = []
            for index in batches(rows):
                loss = self.loss(rows[index])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return sum(losses) / len(losses)

    @torch.inference_mode()
    def score(self, rows: Rows) -> dict[str, float]:
        """Returns the share of rows that are wholly right, and of several labels the micro-F1."""
        self.model.eval()
        logits = torch.cat([self.logits(rows[i]) for i in torch.arange(len(rows.texts)).split(32)])
        if not self.task.multi_label:
            right = logits.argmax(1) == rows.targets.argmax(1)
            return {"accuracy": right.double().mean().item()}
        said, true = logits >= 0, rows.targets == 1
        both = (said & true).sum().item()
        return {
            "accuracy": (said == true).all(1).double().mean().item(),
            "micro_f1": 2 * both / (said.sum() + true.sum()).item(),
        }

    def save(self, folder: Path) -> None:
        """Writes the adapter as PEFT does, and its task.json."""
        config = self.model.peft_config["default"]
        assert isinstance(config, LoraConfig)
        config.base_model_name_or_path = BASE_ID  # PEFT put this machine's path there.
        config.target_modules = sorted(config.target_modules or ())  # A set is saved in any order.
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()  # It is an empty form.
        rules = {
            "labels": self.task.labels,
            "problem_type": self.task.problem_type,
            "max_length": MAX_LENGTH,
            "base_sha256": BASE_SHA256,
        }
        write_json(folder / "task.json", rules)


def write_json(path: Path, content: object) -> None:
    """Writes an object as JSON for people."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def train(name: str) -> dict[str, float]:
    """Trains and saves a task's adapter, and returns how well it does on the held-out rows."""
    task = TASKS[name]
    trainee = Trainee(task)
    started = time.perf_counter()
    loss = trainee.fit(read(f"{name}.train", task.labels))
    seconds = time.perf_counter() - started
    trainee.save(EXAMPLES / "store" / name)
    held_out = read(f"{name}.heldout", task.labels)
    measured = {key: round(value, 6) for key, value in trainee.score(held_out).items()}
    told = ", ".join(f"{key} {value:.3f}" for key, value in measured.items())
    print(f"{name}: {seconds:.0f} s, train loss {loss:.3f}, held-out {told}", flush=True)
    return {"rows": len(held_out.texts), "train_loss": round(loss, 6), **measured}


def main() -> None:
    """Trains the named tasks, or all, and notes what they reach."""
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    parser.add_argument("tasks", nargs="*", metavar="task", help=f"of {', '.join(TASKS)}; or all")
    names = parser.parse_args().tasks or list(TASKS)
    if unknown := set(names) - set(TASKS):
        parser.error(f"no such task: {', '.join(sorted(unknown))}")
    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()  # It warns that the head is new: so it shall be.
    known = json.loads(ACCURACY.read_text()) if ACCURACY.exists() else {}
    for name in names:
        known[name] = train(name)
        write_json(ACCURACY, {task: known[task] for task in TASKS if task in known})


if __name__ == "__main__":
    main()
