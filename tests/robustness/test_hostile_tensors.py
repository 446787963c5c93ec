"""Files that would deceive, hang or fill the memory are refused by every reader, in one line; what is sound is read as it is."""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from tiny import build_model

from sdlora import tensors
from sdlora.cli import main
from sdlora.data.cache import TensorCache, survey
from sdlora.errors import WeightsError
from sdlora.lora import formats

LAYER = "lora_unet_mid_block_attentions_0_proj_in"
NAMES = (f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight", f"{LAYER}.alpha")


def raw(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = json.dumps(entry(0, 4, [1])).encode()
FOUR = b"\0" * 4
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "length of a header"),
    "three bytes": (lambda: b"\1\2\3", "length of a header"),
    "length 0": (lambda: raw(b""), "length of a header"),
    "length beyond the file": (lambda: raw(b"{}", length=1000), "length of a header"),
    "length 2**64 - 1": (lambda: raw(b"{}", length=2**64 - 1), "length of a header"),
    "200 MB of header": (lambda: raw(b" " * 200_000_000 + b"{}"), "200,000,002 bytes is larger"),
    "18 MB of names": (lambda: raw(b"{" + b",".join(b'"%d":%s' % (n, ONE) for n in range(300_000)) + b"}", FOUR), "is larger than"),
    "no JSON": (lambda: raw(b"hello"), "JSON"),
    "no UTF-8": (lambda: raw(b'{"\xff": 1}'), "UTF-8"),
    "a list": (lambda: raw(b"[]"), "JSON"),
    "two tables": (lambda: raw(b"{} {}"), "JSON"),
    "nested": (lambda: raw(b'{"a":' + b"[" * 100_000), "JSON"),
    "lists of lists": (lambda: raw(b'{"a":[' + b"[]," * 1_000_000 + b"1]}"), "JSON"),
    "a name twice": (lambda: raw(b'{"a":%s,"a":%s}' % (ONE, ONE), FOUR), "'a' stands twice"),
    "a name twice, once escaped": (lambda: raw(b'{"a":%s,"\\u0061":%s}' % (ONE, ONE), FOUR), "'a' stands twice"),
    "metadata twice": (lambda: raw(b'{"__metadata__":{"m":"1","m":"2"},"a":%s}' % ONE, FOUR), "'m' stands twice"),
    "metadata that is no text": (lambda: raw({"__metadata__": {"m": 1}, "a": entry(0, 4, [1])}, FOUR), "expected a string"),
    "overlapping": (lambda: raw({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, FOUR), "invalid offset"),
    "a hole": (lambda: raw({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, FOUR * 3), "invalid offset"),
    "beyond the file": (lambda: raw({"a": entry(0, 8, [2])}, FOUR), "not fully covered"),
    "bytes behind": (lambda: raw({"a": entry(0, 4, [1])}, FOUR * 9), "not fully covered"),
    "negative": (lambda: raw({"a": entry(-4, 0, [1])}, FOUR), "JSON"),
    "end before begin": (lambda: raw({"a": entry(4, 0, [1])}, FOUR), "invalid offset"),
    "another shape": (lambda: raw({"a": entry(0, 4, [2])}, FOUR), "invalid shape"),
    "an unknown type": (lambda: raw({"a": entry(0, 4, [1], "F33")}, FOUR), "F33"),
    "shapes that overflow": (lambda: raw({"a": entry(0, 4, [2**62, 2**62])}, FOUR), "overflow"),
    "a number of 5,000 digits": (lambda: raw(b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 5000), FOUR), "JSON"),
    "NUL in a name": (lambda: raw({"a\0b": entry(0, 4, [1])}, FOUR), "control characters"),
    "a terminal's codes in a name": (lambda: raw({"\x1b[2J": entry(0, 4, [1])}, FOUR), "control characters"),
    "a way out of the folder": (lambda: raw({"../../x": entry(0, 4, [1])}, FOUR), "not a LoRA that is understood: ../../x"),
    "not a number": (lambda: save({NAMES[0]: torch.tensor([[float("nan")]])}), "not finite"),
    "numbers of four bits": (lambda: raw({NAMES[0]: entry(0, 1, [2], "F4")}, b"\0"), "not a kind of number"),
    "numbers of four bits, one a row": (lambda: raw({NAMES[0]: entry(0, 1, [2, 1], "F4")}, b"\0"), "dtype requires"),
    "rank 0": (lambda: save({NAMES[0]: torch.zeros(0, 3), NAMES[1]: torch.zeros(3, 0)}), "do not belong together"),
    "matrices without sides": (lambda: save({NAMES[0]: torch.zeros(()), NAMES[1]: torch.zeros(())}), "do not belong together"),
    "two ranks": (lambda: save({NAMES[0]: torch.zeros(2, 3), NAMES[1]: torch.zeros(3, 1)}), "do not belong together"),
    "two alphas": (
        lambda: save({NAMES[0]: torch.zeros(1, 3), NAMES[1]: torch.zeros(3, 1), NAMES[2]: torch.zeros(2)}),
        "do not belong together",
    ),
}
READERS: tuple[Callable[[Path], object], ...] = (formats.load, formats.read_alphas, formats.read_scales)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_every_reader(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    make, reason = HOSTILE[name]
    path.write_bytes(make())
    for reader in READERS:
        began = time.process_time()
        with pytest.raises(WeightsError) as error:
            reader(path)
        assert reason in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 700
        assert time.process_time() - began < 2
    assert main(["alphas", str(path)]) == 2
    assert main(["generate", "a cat", "--lora", str(path), "--out", str(tmp_path / "out")]) == 2
    assert main(["generate", "a cat", "--base", str(path), "--out", str(tmp_path / "out")]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sdlora: ")]  # beside the libraries' bars
    assert len(told) == 3 and all(line.isprintable() for line in told)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_hostile_headers_are_refused_without_their_tensors(tmp_path: Path) -> None:
    path, of_tensors = tmp_path / "x.safetensors", ("understood", "finite", "belong together", "kind of number", "dtype requires")
    for make, reason in HOSTILE.values():
        path.write_bytes(make())
        if any(word in reason for word in of_tensors):
            tensors.read_header(path)
            continue
        with pytest.raises(WeightsError) as error:
            tensors.read_header(path)
        assert reason in str(error.value)
    path.write_bytes(HOSTILE["numbers of four bits"][0]())
    with path.open("rb") as file, pytest.raises(WeightsError, match="is of F4"):
        tensors.read_tensor(file, tensors.read_header(path), NAMES[0])


def test_hostile_shards_are_named_and_give_nothing(tmp_path: Path) -> None:
    for number, (make, _) in enumerate(HOSTILE.values()):
        (tmp_path / "latents").mkdir(exist_ok=True)
        (tmp_path / "latents" / f"{number}.safetensors").write_bytes(make())
    cache = TensorCache(tmp_path / "latents", "mini")
    assert "a" not in cache and cache.get("a") is None
    (held,) = survey(tmp_path)
    assert len(held.damaged) == len(HOSTILE) and held.entries == 0


@pytest.mark.parametrize("checksum", [None, torch.tensor([1, 2]), torch.tensor(1.5), torch.tensor(0)])
def test_a_shard_with_a_wrong_checksum_gives_nothing(tmp_path: Path, checksum: torch.Tensor | None) -> None:
    entries = {"k/mean": torch.ones(3)} | ({} if checksum is None else {"k/crc32": checksum})
    folder = tmp_path / "latents"
    folder.mkdir()
    save_file(entries, folder / "1.safetensors", {"sdlora_cache": "2"})
    assert TensorCache(folder, "mini").get("k") is None
    assert [held.models for held in survey(tmp_path)] == [("another program's",)]


def test_memory_stays_small(tmp_path: Path) -> None:
    """The most that a header can ask for, one after the other in a process of their own."""
    size = tensors.LARGEST_HEADER
    headers = {
        "names": b"{" + b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(size // 62)) + b"}",
        "metadata": b'{"__metadata__":{' + b",".join(b'"%x":""' % n for n in range(size // 12)) + b'},"a":%s}' % ONE,
        "too large": b"{" + b",".join(b'"%x":%s' % (n, ONE) for n in range(300_000)) + b"}",
    }
    code = (
        "import gc, sys\nfrom pathlib import Path\nfrom sdlora.tensors import opened\n"
        "of = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "before = int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1])\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "for path in sys.argv[1:]:\n    try:\n        opened(Path(path))\n    except ValueError:\n        pass\n"
        "print(of() - before)"
    )
    for name, header in headers.items():
        (tmp_path / name).write_bytes(raw(header, FOUR if ONE in header else b""))
    grown = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / name) for name in headers)], capture_output=True, text=True, check=True
    )
    assert 20_000 < int(grown.stdout) < 200_000, f"{grown.stdout} kB"


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors, as the readers of files take them one by one, and the metadata."""
    with tensors.reading(path), tensors.opened(path) as file:
        return {key: tensors.finite(path, key, file.get_tensor(key)) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def test_what_is_sound_is_read_as_it_is(tmp_path: Path) -> None:
    wanted = {"a/../b": torch.randn(2, 3), "ünïcödé 猫": torch.tensor(3), "half": torch.ones(2, dtype=torch.float16)}
    save_file(wanted, tmp_path / "x.safetensors", {"said": '{"a": "a"}'})
    found, metadata = read(tmp_path / "x.safetensors")
    assert metadata == {"said": '{"a": "a"}'} and found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)


@pytest.mark.parametrize("length", [0x280, 0x480])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(length: int, tmp_path: Path) -> None:
    header = json.dumps({"a": entry(0, 4, [1])}).encode().ljust(length)
    (tmp_path / "x.safetensors").write_bytes(raw(header, FOUR))
    assert read(tmp_path / "x.safetensors")[0]["a"].tolist() == [0]


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors", Path("/dev/zero")):
        with pytest.raises(WeightsError, match="it is no file"):
            read(path)
    with pytest.raises(WeightsError, match="There is no file"):
        read(tmp_path / "nowhere.safetensors")


PLAIN = {f"{LAYER}.lora_down.weight": torch.ones(1, 3), f"{LAYER}.lora_up.weight": torch.ones(3, 1)}
NO_NUMBERS = ("NaN", "[1]", "9" * 400, "{}", '"x"')


@pytest.mark.parametrize("metadata", ["[" * 100_000, "[1]", "x", *(f'{{"{LAYER}": {value}}}' for value in NO_NUMBERS)])
def test_hostile_metadata_is_refused(metadata: str, tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "x.safetensors", {formats.LEARNED_ALPHAS: metadata, formats.LEARNED_SCALES: metadata})
    for reader in READERS[1:]:
        with pytest.raises(WeightsError, match=r"metadata sdlora_learned_.* is damaged"):
            reader(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        "[" * 100_000,
        '{"lora_alpha": []}',
        '{"lora_alpha": "x"}',
        '{"lora_alpha": 1, "alpha_pattern": [1]}',
        f'{{"lora_alpha": {"9" * 400}}}',
    ],
)
def test_hostile_options_of_peft_are_refused(options: str, tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "x.safetensors", {formats.PEFT_CONFIG: options})
    with pytest.raises(WeightsError, match=r"metadata lora_adapter_metadata is damaged"):
        formats.load(tmp_path / "x.safetensors")


def test_options_of_peft_run_no_expression(tmp_path: Path) -> None:
    slow = json.dumps({"lora_alpha": 1, "alpha_pattern": {"(.*.*)*(.*.*)*(.*.*)*x": 3, "mid_block.attentions.0.proj_in": 2, "(": 4}})
    save_file(PLAIN, tmp_path / "x.safetensors", {formats.PEFT_CONFIG: slow})
    began = time.process_time()
    (change,) = formats.load(tmp_path / "x.safetensors")[0].values()
    assert change.factors is not None and change.factors.alpha == 2 and time.process_time() - began < 1


class Gadget:
    """Unpickles to a call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.called = call, arguments

    def __reduce__(self) -> Any:
        return self.called


def gadgets(canary: str) -> dict[str, Any]:
    code = f"open({canary!r}, 'w').close()"
    return {
        "os.system": Gadget(os.system, f"touch {canary}"),
        "exec": Gadget(exec, code),
        "eval": Gadget(eval, code),
        "open": Gadget(open, canary, "w"),
        "subprocess": Gadget(subprocess.call, ["touch", canary]),
        "mkfifo": Gadget(os.mkfifo, canary),
        "torch.load of another": Gadget(torch.save, {}, canary),
    }


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("of", ["torch", "torch, old", "pickle 0", "pickle 4"])
def test_no_pickle_is_read(of: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary = tmp_path / "canary"
    for name, gadget in gadgets(str(canary)).items():
        path = tmp_path / f"x{ending}"
        state = {"state_dict": gadget, **dict.fromkeys(NAMES, torch.ones(1))}
        if of.startswith("torch"):
            torch.save(state, path, _use_new_zipfile_serialization=of == "torch")
        else:
            path.write_bytes(pickle.dumps(gadget, protocol=int(of[-1])))
        assert main(["alphas", str(path)]) == 2
        assert main(["generate", "a cat", "--lora", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 2 and f"{path} is not a readable .safetensors file" in error
        assert "pickle" in error or of == "pickle 0", "text that any file could begin with"
        assert not canary.exists(), name


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("of", ["torch", "torch, old", "pickle 4"])
def test_no_gadget_in_a_base_model_is_run(of: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary, path = tmp_path / "canary", tmp_path / f"x{ending}"
    for name, gadget in gadgets(str(canary)).items():
        if of.startswith("torch"):
            torch.save({"state_dict": {"a": gadget}}, path, _use_new_zipfile_serialization=of == "torch")
        else:
            path.write_bytes(pickle.dumps(gadget, protocol=4))
        assert main(["generate", "a cat", "--base", str(path), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error
        assert not canary.exists(), name


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_no_gadget_in_a_folder_of_a_model_is_run(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary, base = tmp_path / "canary", build_model(tmp_path / "tiny")
    for part in ("unet", "vae", "text_encoder"):
        for path in (base / part).glob("*.safetensors"):
            whole, fake = path.read_bytes(), path.with_suffix(ending)
            if ending == ".bin" and part == "text_encoder":
                fake = path.with_name("pytorch_model.bin")
            path.unlink()
            torch.save({"a": Gadget(os.system, f"touch {canary}")}, fake)
            assert main(["generate", "a cat", "--base", str(base), "--out", str(tmp_path / "out")]) == 2
            error = capsys.readouterr().err.splitlines()
            assert [str(base) in line for line in error if line.startswith("sdlora: ")] == [True]
            assert not canary.exists()
            fake.unlink()
            path.write_bytes(whole)


def test_the_gadgets_are_live(tmp_path: Path) -> None:
    for name, gadget in gadgets(str(tmp_path / "canary")).items():
        pickle.loads(pickle.dumps(gadget))
        assert (tmp_path / "canary").exists(), name
        (tmp_path / "canary").unlink()
