"""vLLM and TEI beside `make bench-gpu`. Neither is here: what stands in for each does its work with
transformers and PEFT, behind the one's documented Python and the other's documented HTTP."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

from benchmarks.bases import save_each, with_adapters
from benchmarks.gpu_peers import (
    PEERS,
    Job,
    Work,
    _save,
    beside,
    merged_model,
    not_run_lines,
    with_tei,
    with_vllm,
)
from benchmarks.peers import NotRun, tei, vllm_lora
from benchmarks.peers.peft_model import answer_mixed

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}

ROUTER = """#!{python}
import argparse, json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

if sys.argv[1:] == ["--version"]:
    sys.exit(print("text-embeddings-router 1.8.1"))
parser = argparse.ArgumentParser()
for name in ("model-id", "hostname", "dtype", "uds-path"):
    parser.add_argument("--" + name, required=True)
for name in ("port", "tokenization-workers"):
    parser.add_argument("--" + name, required=True, type=int)
args = parser.parse_args()
mode, folder = "{mode}", "{folder}"
if mode == "dies":
    sys.exit("Error: Could not create backend\\n\\nCaused by: | no room")
if mode == "works":
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    dtype = {{"float16": torch.float16, "float32": torch.float32}}[args.dtype]
    tokenizer = AutoTokenizer.from_pretrained(args.model_id)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_id, dtype=dtype).eval()
    config = json.load(open(args.model_id + "/config.json"))

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def say(self, status, said):
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.say(503 if mode == "sick" else 200 if self.path == "/health" else 404, None)

    def do_POST(self):
        assert self.path == "/predict"
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        if mode == "refuses":
            return self.say(424, {{"error": "Inference failed", "error_type": "backend"}})
        assert len(given) <= 32 and all(len(row) == 1 for row in given), given
        ids = tokenizer([row[0] for row in given], return_tensors="pt")
        with torch.inference_mode():
            rows = model(**ids).logits.float().softmax(-1).tolist()
        said = [[{{"score": score, "label": config["id2label"][str(index)]}}
                 for index, score in enumerate(row)] for row in rows]
        self.say(200, [sorted(row, key=lambda one: -one["score"]) for row in said])

with open(folder + "/" + str(os.getpid()), "w") as file:
    file.write(os.environ["PROMETHEUS_PORT"] + " " + str(args.port) + " " + args.uds_path)
ThreadingHTTPServer((args.hostname, args.port), Handler).serve_forever()
"""

VLLM = """
import sys
from types import SimpleNamespace

class LLM:
    def __init__(self, model, *, runner, enable_lora, max_loras, max_lora_rank, max_model_len,
                 gpu_memory_utilization, enable_prefix_caching):
        if MODE == "refuses":
            raise ValueError("LoRA is not supported\\nfor this class")
        if MODE == "dies":
            sys.exit(3)
        assert runner == "pooling" and enable_lora and not enable_prefix_caching
        assert max_lora_rank == 8 and 0 < gpu_memory_utilization < 1
        from transformers import AutoModelForSequenceClassification
        self.model = AutoModelForSequenceClassification.from_pretrained(model).eval()
        self.most = max_loras

    def classify(self, prompts, *, use_tqdm, lora_request):
        import torch
        from peft import PeftModel
        assert len(prompts) == len(lora_request)
        requests = {one.lora_int_id: one for one in lora_request}
        assert 0 not in requests and len(requests) <= self.most
        first, *others = requests.values()
        if not isinstance(self.model, PeftModel):
            self.model = PeftModel.from_pretrained(self.model, first.lora_path, first.lora_name)
            for one in others:
                self.model.load_adapter(one.lora_path, one.lora_name)
        outputs = []
        for prompt, one in zip(prompts, lora_request):
            self.model.set_adapter(one.lora_name)
            with torch.inference_mode():
                ids = torch.tensor([prompt["prompt_token_ids"]])
                probs = self.model(input_ids=ids).logits[0].float().softmax(-1).tolist()
            outputs.append(SimpleNamespace(outputs=SimpleNamespace(probs=probs)))
        return outputs
"""

REQUEST = """
class LoRARequest:
    def __init__(self, lora_name, lora_int_id, lora_path):
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Two threads on two busy cores mostly wait for each other.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[[str], tuple[Job, PeftModel]]:
    """Returns five rows for two adapters of a kind of base, and PEFT's own model of them."""

    def make(kind: str) -> tuple[Job, PeftModel]:
        torch.manual_seed(0)
        model = (
            BertModel(BertConfig(**SIZES)) if kind == "bert" else LlamaModel(LlamaConfig(**SIZES))
        )
        model.save_pretrained(tmp_path / "base")
        peft = with_adapters(
            str(tmp_path / "base"), {"target_modules": TARGETS[kind], "r": 8}, count=2
        )
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    parameter.normal_(std=0.3)
        save_each(peft, tmp_path / "store")
        ids = torch.randint(5, 64, (5, 9))
        adapters = [tmp_path / "store" / f"a{index}" for index in range(2)]
        return Job(str(tmp_path / "base"), adapters, ids, torch.float32), peft

    return make


@pytest.fixture
def put_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a `text-embeddings-router` on PATH; returns the folder in which each says its ports."""

    def put(mode: str) -> Path:
        said, path = tmp_path / "said", tmp_path / "bin" / tei.BINARY
        said.mkdir()
        path.parent.mkdir()
        path.write_text(ROUTER.format(python=sys.executable, mode=mode, folder=said))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        return said

    return put


@pytest.fixture
def put_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes a package vllm importable, here and in processes that are spawned."""

    def put(version: str, mode: str = "works") -> None:
        site = tmp_path / "site"
        (site / "vllm" / "lora").mkdir(parents=True)
        (site / "vllm" / "__init__.py").write_text(f"MODE = {mode!r}\n{VLLM}")
        (site / "vllm" / "lora" / "__init__.py").touch()
        (site / "vllm" / "lora" / "request.py").write_text(REQUEST)
        info = site / f"vllm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(site)

    return put


def run(name: str, job: Job) -> tuple[dict[str, object], dict[str, str], dict[str, str]]:
    taken, versions, not_run = beside(lambda: None, job, 2, 1, {name: PEERS[name]})
    return dict(taken), versions, not_run


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_what_is_not_installed_is_not_run(
    make_job: Callable[..., tuple[Job, PeftModel]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert beside(lambda: None, make_job("bert")[0], 1, 1) == (
        {},
        {},
        {
            "vLLM": "the package vllm is not installed",
            "TEI": "text-embeddings-router is not on PATH",
        },
    )


def test_merged_models_under_tei_answer_as_peft_does_and_all_of_them_end(
    make_job: Callable[..., tuple[Job, PeftModel]], put_router: Callable[[str], Path]
) -> None:
    job, peft = make_job("bert")
    said = put_router("works")
    with with_tei(job) as (version, work):
        answers = work()
        assert work() == answers
        started = {int(path.name): path.read_text().split() for path in said.iterdir()}
        assert all(alive(pid) for pid in started)
    assert version == "1.8.1"
    assert len(started) == 2
    assert len({port for own in started.values() for port in own}) == 6, "one is shared"
    assert not any(alive(pid) for pid in started)
    tokens = torch.cat([torch.full((5, 1), 2), job.ids[:, :-2], torch.full((5, 1), 3)], dim=1)
    names = ["a0", "a1", "a0", "a1", "a0"]
    want = answer_mixed(peft, tokens, torch.ones_like(tokens), names).softmax(-1)
    assert isinstance(answers, list)
    got = torch.tensor([[row["no"], row["yes"]] for row in answers])
    assert (got - want).abs().max() <= 1e-5
    wrong = answer_mixed(peft, tokens, torch.ones_like(tokens), [*names[1:], "a1"]).softmax(-1)
    assert (want - wrong).abs().max() > 1e-2, "so alike that it shows nothing"


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_vllm_is_given_a_row_of_each_adapter(
    kind: str,
    make_job: Callable[..., tuple[Job, PeftModel]],
    put_vllm: Callable[..., None],
) -> None:
    job, peft = make_job(kind)
    put_vllm("0.31.0")
    with with_vllm(job) as (version, work):
        answers = work()
        assert work() == answers
    assert version == "0.31.0"
    names = ["a0", "a1", "a0", "a1", "a0"]
    want = answer_mixed(peft, job.ids, torch.ones_like(job.ids), names).softmax(-1)
    assert (torch.tensor(answers) - want).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_adapters_are_as_vllm_documents_that_it_takes_them(
    kind: str, make_job: Callable[..., tuple[Job, PeftModel]]
) -> None:
    job, _ = make_job(kind)
    for folder in job.adapters:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert set(config["modules_to_save"]) <= {"classifier", "score"}
        assert (config["bias"], config["use_dora"], config["r"]) == ("none", False, 8)
        weights = load_file(folder / "adapter_model.safetensors")
        heads = {name: part.shape for name, part in weights.items() if "lora_" not in name}
        assert [shape for shape in heads.values() if len(shape) == 2] == [(2, 32)]
        assert {name.split(".")[-2] for name in heads} <= {"classifier", "score"}


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("dies", "RuntimeError: a server ended with 1: Caused by: | no room"),
        ("refuses", 'RuntimeError: /predict answers 424: {"error": "Inference failed", '),
    ],
)
def test_where_tei_fails_a_line_says_why(
    mode: str,
    reason: str,
    make_job: Callable[..., tuple[Job, PeftModel]],
    put_router: Callable[[str], Path],
) -> None:
    said = put_router(mode)
    taken, versions, not_run = run("TEI", make_job("bert")[0])
    assert (taken, versions) == ({}, {})
    assert not_run["TEI"].startswith(reason)
    assert not any(alive(int(path.name)) for path in said.iterdir())


def test_tei_is_not_waited_for_without_end(
    make_job: Callable[..., tuple[Job, PeftModel]], put_router: Callable[[str], Path]
) -> None:
    said = put_router("sick")
    slow = tei.servers([Path("a")], "float16", start_s=2)
    with pytest.raises(RuntimeError, match="not healthy in time"), slow:
        pass
    assert not any(alive(int(path.name)) for path in said.iterdir())


def test_tei_has_no_classifiers_that_are_decoders(
    make_job: Callable[..., tuple[Job, PeftModel]], put_router: Callable[[str], Path]
) -> None:
    put_router("works")
    assert run("TEI", make_job("llama")[0])[2] == {"TEI": "it has no classifiers of type llama"}


@pytest.mark.parametrize(
    ("version", "mode", "reason"),
    [
        ("0.30.2", "works", "vllm 0.30.2 reads no heads of adapters, 0.31 and newer do"),
        ("0.33.0", "refuses", "RuntimeError: ValueError: LoRA is not supported for this class"),
        ("1.0", "dies", "RuntimeError: vLLM's process ended"),
    ],
)
def test_where_vllm_is_too_old_or_fails_a_line_says_why(
    version: str,
    mode: str,
    reason: str,
    make_job: Callable[..., tuple[Job, PeftModel]],
    put_vllm: Callable[..., None],
) -> None:
    put_vllm(version, mode)
    assert run("vLLM", make_job("bert")[0]) == ({}, {}, {"vLLM": reason})


def test_what_runs_is_timed_beside_the_plain_base_and_what_fails_stops_no_other(
    make_job: Callable[..., tuple[Job, PeftModel]],
) -> None:
    order: list[str] = []

    @contextmanager
    def good(_: Job) -> Iterator[tuple[str, Work]]:
        yield "7", lambda: order.append("good")
        order.append("ended")

    @contextmanager
    def bad(_: Job) -> Iterator[tuple[str, Work]]:
        yield "8", lambda: 1 / 0

    def absent(_: Job) -> AbstractContextManager[tuple[str, Work]]:
        raise NotRun("it is absent")

    peers = {"bad": bad, "absent": absent, "good": good}
    taken, versions, not_run = beside(
        lambda: order.append("plain"), make_job("bert")[0], 2, 1, peers
    )
    assert versions == {"good": "7"}
    assert not_run == {"bad": "ZeroDivisionError: division by zero", "absent": "it is absent"}
    assert {name: len(runs) for name, runs in taken["good"].items()} == {"plain": 2, "good": 2}
    assert order == ["good", "plain", "good", "plain", "good", "plain", "good", "ended"]


def test_a_reason_is_one_line_of_the_table_for_all_bases_that_it_is_of() -> None:
    rows = [
        {"base": "A", "not_run": {"vLLM": "a | b", "TEI": "c"}},
        {"base": "A"},
        {"base": "B", "not_run": {"vLLM": "a | b", "TEI": "d"}},
    ]
    assert not_run_lines(rows, 4) == [
        ["vLLM: A, B", "not run: a / b", "–", "–"],
        ["TEI: A", "not run: c", "–", "–"],
        ["TEI: B", "not run: d", "–", "–"],
    ]


def test_the_tokenizer_that_is_saved_reads_words_as_their_numbers(
    make_job: Callable[..., tuple[Job, PeftModel]], tmp_path: Path
) -> None:
    job, _ = make_job("bert")
    _save(merged_model(job.base, str(job.adapters[0])), tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("w5 w63 w17")["input_ids"] == [2, 5, 63, 17, 3]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_the_versions_are_compared_as_numbers(put_vllm: Callable[..., None]) -> None:
    put_vllm("0.100.1rc2")
    assert vllm_lora.find() == "0.100.1rc2"
