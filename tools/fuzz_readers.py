"""Gives every reader of files that somebody else may have made damaged and hostile ones, for so many seconds each.

    python tools/fuzz_readers.py --seconds 60 --seed 0 --keep findings

Each case is a valid file, or folder of files, of which one is changed: bytes flipped, cut, inserted, repeated and
spliced anywhere, or what they say (values of JSON and TOML, headers of safetensors, pickles in archives, fields of
ONNX, sizes of pictures), with the checksums made to fit again. A reader may give a result, or raise DfqError with the
name of the file; anything else is a finding, as is a process that dies or a case of more than `LONGEST` seconds.
Findings are kept as files in `--keep`.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import multiprocessing
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

import dfq
from calibration.calibration_set import SetFolder, load_calibration_set
from calibration.sources import real_images
from calibration.tokens import PatchGrid
from dfq import checkpoint, reference
from dfq.architectures import build_architecture
from dfq.models import Model
from dfq.ptq.engine import QuantizedModel
from dfq.ptq.modules import adapt
from dfq.ptq.resume import ResumeFile
from dfq.ptq.stages import stages
from dfq.recipe import PRESETS, load_recipe
from dfq.transfer.folder import TransferFolder
from dfq.transfer.record import LOG, STATE, Round, StateFile, write_log
from dfq.transfer.result import Distillation
from dfq.transfer.training import Trainee
from dfq.weights import load_into, read_weights

LONGEST = 20
"""Seconds that a case may take."""

Files = dict[str, bytes]


class Hang(BaseException):
    """Not an Exception: no reader may take it for a damaged file."""


@dataclass(frozen=True)
class Reader:
    """files: valid ones by name, of which those in `changed` are changed; read: the folder they lie in."""

    files: Callable[[], Files]
    read: Callable[[Path], object]
    changed: tuple[str, ...]
    seal: Callable[[Files], None] = lambda files: None


def main() -> None:
    arguments = parse_arguments()
    found = 0
    for name in arguments.readers:
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as where:
            process = context.Process(target=fuzz, args=(name, arguments, Path(where)))
            process.start()
            process.join()
            if process.exitcode not in (0, 1):
                keep(arguments.keep, name, f"died{process.exitcode}", Path(where) / "case")
                print(f"{name}: the process died ({process.exitcode})", flush=True)
            found += process.exitcode != 0
    sys.exit(f"{found} readers with findings" if found else 0)


def fuzz(name: str, arguments: argparse.Namespace, where: Path) -> None:
    """One reader, in a process of its own."""
    torch.set_num_threads(1)
    reader = READERS[name]
    reader.files()
    draw = random.Random(f"{arguments.seed} {name}")
    cases, refused, findings = 0, 0, dict[str, int]()
    started = time.monotonic()
    while time.monotonic() - started < arguments.seconds:
        files, changed = hostile(reader, draw)
        said = judge(reader, files, changed, where / "case")
        cases += 1
        refused += said == "refused"
        if said not in ("read", "refused"):
            if said not in findings:
                keep(arguments.keep, name, str(cases), where / "case")
                print(f"{name}: case {cases}, {changed}: {said}", flush=True)
            findings[said] = findings.get(said, 0) + 1
    seconds = time.monotonic() - started
    print(f"{name}: {cases} cases in {seconds:.0f} s, {refused} refused, {sum(findings.values())} findings", flush=True)
    sys.exit(bool(findings))


def keep(folder: Path | None, name: str, case: str, files: Path) -> None:
    if folder is not None and files.is_dir():
        shutil.copytree(files, folder / f"{name}-{case}", symlinks=True, dirs_exist_ok=True)


def hostile(reader: Reader, draw: random.Random) -> tuple[Files, str]:
    """The reader's files with one changed, and its name."""
    files = dict(reader.files())
    changed = draw.choice(reader.changed)
    structured = STRUCTURED.get(changed.rpartition(".")[2], mutate_bytes)
    mutate = draw.choice((mutate_bytes, structured, structured))
    for _ in range(draw.choice((1, 1, 2, 4))):
        try:
            files[changed] = mutate(files[changed], draw)
        # What was changed before is no such file any more.
        except Exception:
            files[changed] = mutate_bytes(files[changed], draw)
    if draw.random() < 0.8:
        with suppress(ValueError, RecursionError, LookupError, TypeError):
            reader.seal(files)
    return files, changed


def judge(reader: Reader, files: Files, changed: str, folder: Path) -> str:
    """`read`, `refused`, or what was wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return outcome(lambda: reader.read(folder), (str(folder), Path(changed).name))


def outcome(read: Callable[[], object], names: tuple[str, ...]) -> str:
    """`read`, `refused`, or what was wrong; names: of which an error must have one."""
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(LONGEST)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
        return "read"
    except dfq.DfqError as error:
        return "refused" if any(name in str(error) for name in names) else f"no file is named: {error}"[:300]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "nowhere"
        return f"{type(error).__name__} at {where}: {error}"[:300]
    finally:
        signal.alarm(0)


def _give_up(*_: object) -> None:
    raise Hang(f"longer than {LONGEST} s")


# Changes


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut off, taken out, inserted, repeated or spliced anywhere, the first ones more often."""
    size = len(content)
    first, second = (draw.randrange(min(size, draw.choice((16, 256, size + 1))) + 1) for _ in range(2))
    first, second = min(first, second), max(first, second)
    kind = draw.randrange(7)
    if kind == 0 and size:
        flipped = bytearray(content)
        for _ in range(draw.choice((1, 1, 8))):
            flipped[draw.randrange(min(size, draw.choice((64, 1024, size))))] ^= draw.choice((1, 128, 255, 16))
        return bytes(flipped)
    if kind == 1:
        return content[:second]
    if kind == 2:
        return content[:first] + content[second:]
    if kind == 3:
        return content[:first] + draw.randbytes(draw.choice((1, 4, 100))) + content[first:]
    if kind == 4:
        return content[:second] + content[first:]
    if kind == 5:
        extreme = draw.choice(
            (b"\xff" * 4, b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"[" * 5000)
        )
        return content[:first] + extreme + content[first + len(extreme) :]
    return content[:first] + content[second : 2 * second - first] + content[second:]


DEEP = "a value as deep as Python's parsers do not go"
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 1.5, 10**12, 2**31, 2**63, -(2**63), 10**400, 1e308, -0.0, 1e-300),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "x" * 3000, "../x", "/etc/passwd", "\0", "\ud800", "..", "."),
    *("w4a4", "reference", "hf-hub:x/y", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "uniform"),
    *([], {}, [[]], [None], [1], [1, 2, 3], [0, 0, 0], ["a"], {"": 1}, {"type": "uniform"}, {"depth": 10**9}),
    *({"img_size": 10**6}, {"embed_dim": 2**20}, {"pretrained": True}, {"checkpoint_path": "x"}, DEEP),
)


def mutate_value(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with something in it replaced, renamed, taken out, added or moved."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    open_ = [value]
    while open_:
        inside = open_.pop()
        if isinstance(inside, dict | list):
            for key in list(inside) if isinstance(inside, dict) else range(len(inside)):
                places.append((inside, key))
                open_.append(inside[key])
    if not places or draw.random() < 0.02:
        return draw.choice(NASTY)
    # Each name as likely as any other, however often it is there.
    names = sorted({str(key) for _, key in places})
    name = draw.choice(names)
    owner, key = draw.choice([place for place in places if str(place[1]) == name])
    kind = draw.randrange(6)
    if kind <= 2:
        owner[key] = copy.deepcopy(draw.choice(NASTY))
    elif kind == 3:
        del owner[key]
    elif kind == 4 and isinstance(owner, dict):
        owner[draw.choice(("unknown", "", key + "x", "../x"))] = owner.pop(key) if draw.random() < 0.5 else owner[key]
    elif kind == 4:
        owner.append(owner[key])
    else:
        other, place = draw.choice(places)
        owner[key] = copy.deepcopy(other[place])
    return value


def to_json(value: Any) -> str:
    text = json.dumps(value)
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    return to_json(mutate_value(json.loads(content), draw)).encode()


def mutate_lines(content: bytes, draw: random.Random) -> bytes:
    lines = [json.loads(line) for line in content.splitlines()]
    return "".join(to_json(line) + "\n" for line in mutate_value(lines, draw)).encode()


TOML = (
    *(
        "true",
        "-1",
        "0",
        "1.5",
        "nan",
        "inf",
        "9" * 5000,
        "0x" + "f" * 5000,
        "1e999",
        "''",
        "'../x'",
        "[]",
        "{}",
        "[[1]]",
    ),
    *(
        "{a = {b = 1}}",
        "1979-05-27",
        "[" * 900 + "]" * 900,
        "[" * 50_000 + "]" * 50_000,
        "'''",
        "2",
        "8",
        "'head'",
        '"\\ud800"',
    ),
)


def mutate_toml(content: bytes, draw: random.Random) -> bytes:
    """A line with another value, a second time, taken out, or a new one."""
    lines = content.decode().splitlines()
    number = draw.randrange(len(lines))
    key, equals, _ = lines[number].partition("=")
    kind = draw.randrange(5)
    if kind <= 1 and equals:
        lines[number] = f"{key}= {draw.choice(TOML)}"
    elif kind == 2:
        lines.insert(draw.randrange(len(lines) + 1), lines[number])
    elif kind == 3:
        del lines[number]
    else:
        keys = (
            "unknown",
            "name",
            "scope",
            "weights",
            "sites",
            "percent",
            "bits",
            "num_images",
            "damping",
            "a." * 100_000 + "b",
        )
        lines.insert(number, draw.choice((f"{draw.choice(keys)} = {draw.choice(TOML)}", f"[{draw.choice(keys)}]")))
    return "\n".join(lines).encode()


DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
DTYPES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8}


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: Any, data: bytes) -> bytes:
    text = to_json(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutate_safetensors(content: bytes, draw: random.Random) -> bytes:
    """A header that lies, or one that is true of other tensors; what is noted in it, changed as JSON."""
    header, data = split_safetensors(content)
    notes = header.get("__metadata__", {})
    names = [name for name in header if name != "__metadata__"]
    kind = draw.randrange(8)
    if kind == 0:
        return join_safetensors(mutate_value(header, draw), data)
    if kind == 1 and notes:
        key = draw.choice(list(notes))
        try:
            notes[key] = to_json(mutate_value(json.loads(notes[key]), draw))
        except ValueError:
            notes[key] = "x"
        return join_safetensors(header, data)
    name = draw.choice(names)
    entry = header[name]
    start, end = entry["data_offsets"]
    if kind == 2:
        entry["shape"] = draw.choice(([10**12], [2**40, 2**40], [0], [], [-1], [2**63], [1] * 1000, [2**32, 2**32]))
    elif kind == 3:
        entry["data_offsets"] = draw.choice(
            ([0, 10**15], [end, start], [start, 2**63], [0, len(data)], [start + 1, end + 1])
        )
    elif kind == 4:
        entry["dtype"] = draw.choice((*DTYPES, "F4", "F6_E2M3", "X", "f32"))
    elif kind == 5:
        dtype = draw.choice(list(DTYPES))
        if (end - start) % DTYPES[dtype] == 0:
            entry |= {"dtype": dtype, "shape": [(end - start) // DTYPES[dtype]]}
    elif kind == 6:
        filling = draw.choice((b"\xff", b"\0", b"\x7f", draw.randbytes(1)))
        data = data[:start] + filling * (end - start) + data[end:]
    elif kind == 7:
        header[draw.choice((name + "x", draw.choice(names), "student." + name, "optimizer.x.y"))] = header.pop(name)
    if draw.random() < 0.05:
        return struct.pack("<Q", draw.choice((0, 2**63, 10**8 + 1, 99_999_999, len(content)))) + content[8:]
    return join_safetensors(header, data)


def mutate_pth(content: bytes, draw: random.Random) -> bytes:
    """The pickle in the archive changed, and the archive whole again; compressed, where that makes it a bomb."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
        chosen = draw.choice(old.namelist())
        for entry in old.infolist():
            part = old.read(entry)
            if entry.filename.endswith("data.pkl") and draw.random() < 0.7:
                part = mutate_bytes(part, draw)
            elif entry.filename == chosen:
                if draw.random() < 0.1:
                    new.writestr(entry.filename, bytes(10**7), zipfile.ZIP_DEFLATED)
                    continue
                part = mutate_bytes(part, draw)
            new.writestr(entry.filename, part)
    return packed.getvalue()


def mutate_onnx(content: bytes, draw: random.Random) -> bytes:
    """Notes changed as JSON, sizes that lie, data in other files, operators that are not there."""
    model = onnx.load_from_string(content)
    kind = draw.randrange(7)
    if kind <= 2:
        note = draw.choice(list(model.metadata_props))
        note.value = to_json(mutate_value(json.loads(note.value), draw))
    elif kind == 3:
        tensor = draw.choice(list(model.graph.initializer))
        tensor.dims[:] = draw.choice(([10**12], [2**40, 2**40], [-1], [0], []))
    elif kind == 4:
        tensor = draw.choice(list(model.graph.initializer))
        tensor.data_location = TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        tensor.external_data.add(key="location", value=draw.choice(("../x", "/etc/passwd", "x")))
    elif kind == 5:
        node = draw.choice(list(model.graph.node))
        node.op_type = draw.choice(("Softmax", "If", "Loop", "NoSuch", "MatMulInteger", ""))
    else:
        place = draw.choice((model.graph.node, model.graph.initializer, model.graph.input, model.graph.output))
        del place[draw.randrange(len(place))]
    return model.SerializeToString()


def mutate_png(content: bytes, draw: random.Random) -> bytes:
    """Another size, depth or kind, its checksum right."""
    header = list(struct.unpack(">IIBBBBB", content[16:29]))
    place = draw.randrange(5)
    header[place] = draw.choice((0, 1, 2, 3, 8, 16, *((50_000, 100_000, 10**6, 2**31 - 1) if place < 2 else ())))
    chunk = b"IHDR" + struct.pack(">IIBBBBB", *header)
    return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": mutate_json,
    "jsonl": mutate_lines,
    "toml": mutate_toml,
    "safetensors": mutate_safetensors,
    "partial": mutate_safetensors,
    "pth": mutate_pth,
    "onnx": mutate_onnx,
    "png": mutate_png,
}


# Valid files, and what reads them


@cache
def teacher() -> Model:
    return dfq.load_model("reference", device="cpu")


@cache
def images() -> Any:
    return dfq.generate(teacher(), "gaussian", 4, progress=False)


@cache
def quantized() -> QuantizedModel:
    return dfq.quantize(teacher(), "w4a4", calibration=images(), recipe="deploy", progress=False)


def files_of(write: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as where:
        write(Path(where))
        return {str(path.relative_to(where)): path.read_bytes() for path in Path(where).rglob("*") if path.is_file()}


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))


@cache
def state() -> dict[str, torch.Tensor]:
    return layer().state_dict()


@cache
def safetensors_files() -> Files:
    entries, data = dict[str, Any](), b""
    for name, tensor in state().items():
        part = tensor.numpy().tobytes()
        entries[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    return {"weights.safetensors": join_safetensors(entries | {"__metadata__": {"format": "pt"}}, data)}


@cache
def pth_files() -> Files:
    packed = {name: io.BytesIO() for name in ("weights.pth", "weights.bin")}
    torch.save({"state_dict": state(), "epoch": 3}, packed["weights.pth"])
    torch.save({"state_dict": state()}, packed["weights.bin"], _use_new_zipfile_serialization=False)
    return {name: file.getvalue() for name, file in packed.items()}


def read_state(name: str) -> Callable[[Path], object]:
    return lambda folder: load_into(layer(), read_weights(folder / name), "layer", folder / name)


@cache
def model_files() -> Files:
    return files_of(lambda folder: checkpoint.save(quantized(), folder))


def seal_model(files: Files) -> None:
    config = json.loads(files["config.json"])
    config["quantization_config"]["sha256"] = sha256(files["model.safetensors"]).hexdigest()
    files["config.json"] = to_json(config).encode()


@cache
def set_files() -> Files:
    def write(path: Path) -> None:
        folder = SetFolder(path, images().run, {})
        for index in range(2):
            folder.write(index, images())
        folder.finish([4, 4])
        folder.release()

    return files_of(write)


def seal_set(files: Files) -> None:
    manifest = json.loads(files["manifest.json"])
    for entry in manifest["shards"]:
        entry["sha256"] = sha256(files[entry["file"]]).hexdigest()
    files["manifest.json"] = to_json(manifest).encode()


def read_set_folder(path: Path) -> None:
    folder = SetFolder(path, images().run, {})
    try:
        folder.read(0)
    finally:
        folder.release()


def unquantized() -> QuantizedModel:
    known = quantized()
    module = adapt(build_architecture("reference", {}))
    return QuantizedModel(
        module.requires_grad_(False), known.preprocessing, known.origin, known.bits, known.recipe, {}, {}
    )


@cache
def resume_files() -> Files:
    def write(folder: Path) -> None:
        file = ResumeFile(folder / "stages.partial")
        file.take_up(unquantized(), teacher(), images(), 4)
        file.keep(quantized(), len(stages(quantized().module)), [torch.zeros(4, 65, 64)], [torch.zeros(4, 65, 64)])

    return files_of(write)


def read_resume(folder: Path) -> None:
    with torch.no_grad():
        ResumeFile(folder / "stages.partial").take_up(unquantized(), teacher(), images(), 4)


def trainee() -> tuple[Trainee, torch.optim.Optimizer]:
    student = layer()
    unused: Any = None
    parameters = list(student.parameters())
    return Trainee(unused, [(parameters, 0.1)], dict(student.named_parameters())), torch.optim.AdamW(parameters)


def rounds() -> list[Round]:
    return [Round(1, 8, 0.5, 75.0, None, 1.0, 2.0), Round(2, 16, 0.25, None, 12.5, 1.0, 2.0)]


@cache
def state_files() -> Files:
    def write(folder: Path) -> None:
        student, optimizer = trainee()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        file = StateFile(folder / STATE, {"seed": 0})
        file.take_up(student, optimizer)
        file.keep(student, optimizer, rounds())

    return files_of(write)


@cache
def transfer_files() -> Files:
    def write(path: Path) -> None:
        with ExitStack() as held:
            folder = TransferFolder(path, {"seed": 0}, held, overwrite=False)
            folder.finish(Distillation(copy.deepcopy(teacher()), "teacher", tuple(rounds()), 99.0))
        write_log(rounds(), path / LOG)

    return files_of(write)


def seal_transfer(files: Files) -> None:
    manifest = json.loads(files["distillation.json"])
    manifest["sha256"] = sha256(files["student.safetensors"]).hexdigest()
    files["distillation.json"] = to_json(manifest).encode()


def read_transfer(path: Path) -> None:
    with ExitStack() as held:
        found = TransferFolder(path, {"seed": 0}, held, overwrite=False).finished(copy.deepcopy(teacher()))
        if found is not None:
            found.describe()
            found.to_dict()


@cache
def onnx_files() -> Files:
    """The mean of each row of pixels, and a linear layer."""
    size = reference.IMAGE_SIZE[0]
    weight = np.random.default_rng(0).normal(size=(size, 10)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["images", "axes"], ["means"], keepdims=0),
            helper.make_node("MatMul", ["means", "weight"], ["logits"]),
        ],
        "means",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(np.array([1, 2]), "axes"), numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    described = {
        "format": "dfq.onnx",
        "version": 1,
        "model": teacher().origin.to_dict(),
        "bits": "w8a8",
        "recipe": "deploy",
        "preprocessing": teacher().preprocessing.to_dict(),
        "num_classes": 10,
        "seed": 7,
        "weight_bytes": 1234,
    }
    model.metadata_props.add(key="dfq", value=json.dumps(described))
    return {"model.onnx": model.SerializeToString()}


def read_onnx(folder: Path) -> None:
    model = dfq.open_model(folder / "model.onnx", threads=1)
    model.describe()
    model.preprocessing.transform()


PICTURES = {
    "a.png": "PNG",
    "b.jpg": "JPEG",
    "c.tif": "TIFF",
    "d.webp": "WEBP",
    "e.bmp": "BMP",
    "f.ppm": "PPM",
    "g.jpeg": "GIF",
}


@cache
def picture_files() -> Files:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    files = Files()
    for name, kind in PICTURES.items():
        packed = io.BytesIO()
        Image.fromarray(pixels).save(packed, kind)
        files[name] = packed.getvalue()
    return files


def read_pictures(folder: Path) -> None:
    prepared = teacher().preprocessing
    grid = PatchGrid(8, 8, 4, 4)
    transform = prepared.transform()
    real_images(folder, grid, transform, mean=prepared.mean, std=prepared.std, num_images=len(PICTURES))


@cache
def recipe_files() -> Files:
    return {"mine.toml": (PRESETS / "accurate.toml").read_bytes()}


READERS = {
    "safetensors": Reader(safetensors_files, read_state("weights.safetensors"), ("weights.safetensors",)),
    "pth": Reader(pth_files, read_state("weights.pth"), ("weights.pth",)),
    "pth_legacy": Reader(pth_files, read_state("weights.bin"), ("weights.bin",)),
    "model": Reader(model_files, dfq.load, ("config.json", "model.safetensors"), seal_model),
    "recipe": Reader(recipe_files, lambda folder: load_recipe(folder / "mine.toml"), ("mine.toml",)),
    "set": Reader(set_files, load_calibration_set, ("manifest.json", "shard-00000.safetensors"), seal_set),
    "set_folder": Reader(set_files, read_set_folder, ("manifest.json", "shard-00000.safetensors"), seal_set),
    "resume": Reader(resume_files, read_resume, ("stages.partial",)),
    "state": Reader(state_files, lambda folder: StateFile(folder / STATE, {"seed": 0}).take_up(*trainee()), (STATE,)),
    "transfer": Reader(
        transfer_files, read_transfer, ("distillation.json", "log.jsonl", "student.safetensors"), seal_transfer
    ),
    "onnx": Reader(onnx_files, read_onnx, ("model.onnx",)),
    "pictures": Reader(picture_files, read_pictures, tuple(PICTURES)),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each reader (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS), metavar="READER")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where files that made findings are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
