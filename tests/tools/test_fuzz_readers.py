"""Hostile files: every reader reads them or says, as a DfqError with the name of the file, why not."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from torch import Tensor

import dfq
from calibration.calibration_set import SetFolder
from calibration.pictures import images_below, read_image
from dfq.errors import RecipeError
from dfq.models import Origin
from dfq.preprocessing import Preprocessing
from dfq.ptq.resume import ResumeFile
from dfq.recipe import load_recipe, recipe_from_dict
from dfq.transfer.record import STATE, StateFile, rounds_of
from dfq.weights import read_weights

READERS = ("safetensors", "pth", "pth_legacy", "model", "recipe", "set", "set_folder", "resume", "state", "transfer")
READERS += ("onnx", "pictures")


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    return load_tool("fuzz_readers")


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_every_reader_is_tried(tool: Any) -> None:
    assert tuple(tool.READERS) == READERS


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(tool: Any, name: str, tmp_path: Path) -> None:
    reader = tool.READERS[name]
    assert tool.judge(reader, reader.files(), reader.changed[0], tmp_path / "case") == "read"


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.randoms(use_true_random=True))
def test_changed_files_are_read_or_refused(tool: Any, name: str, tmp_path: Path, draw: Any) -> None:
    files, changed = tool.hostile(tool.READERS[name], draw)
    assert tool.judge(tool.READERS[name], files, changed, tmp_path / "case") in ("read", "refused")


def test_what_is_wrong_is_told(tool: Any) -> None:
    def raising(error: BaseException) -> Callable[[], object]:
        def read() -> None:
            raise error

        return read

    assert tool.outcome(raising(dfq.DfqError("a.json is damaged")), ("a.json",)) == "refused"
    assert tool.outcome(raising(dfq.DfqError("it is damaged")), ("a.json",)) == "no file is named: it is damaged"
    assert tool.outcome(raising(MemoryError()), ("a.json",)).startswith("MemoryError at ")
    assert tool.outcome(raising(tool.Hang("long")), ("a.json",)).startswith("Hang at ")
    assert tool.outcome(lambda: None, ()) == "read"


# Weights


class Writes:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    target = tmp_path / "made by the pickle"
    torch.save({"a": Writes(target)}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(dfq.DfqError, match=r"a\.pth holds more than weights"):
        read_weights(tmp_path / "a.pth")
    (tmp_path / "b.bin").write_bytes(pickle.dumps(Writes(target)))
    with pytest.raises(dfq.DfqError, match=r"b\.bin"):
        read_weights(tmp_path / "b.bin")
    assert not target.exists()


def test_a_compressed_archive_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(dfq.DfqError, match=r"a\.pth is a compressed archive"):
        read_weights(tmp_path / "a.pth")


def test_views_that_would_fill_the_memory(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1, dtype=torch.half).expand(10**6, 10**6)}, tmp_path / "a.pth")
    with pytest.raises(dfq.DfqError, match=r"a\.pth would unpack to far more than its size"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")])
def test_tensors_that_are_no_weights(tmp_path: Path, tensor: Tensor) -> None:
    torch.save({"fine": torch.zeros(1), "odd": tensor}, tmp_path / "a.pth")
    with pytest.raises(dfq.DfqError, match=r"a\.pth holds a tensor that is not plain numbers \(odd\)"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("entry", "data"),
    [
        ({"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}, b""),
        ({"dtype": "F32", "shape": [10**12], "data_offsets": [0, 16]}, bytes(16)),
        ({"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}, b""),
        ({"dtype": "F64", "shape": [4], "data_offsets": [0, 16]}, bytes(16)),
        ({"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}, bytes(32)),
    ],
)
def test_safetensors_that_lie(tool: Any, tmp_path: Path, entry: dict[str, Any], data: bytes) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(tool.join_safetensors({"a": entry}, data))
    with pytest.raises(dfq.DfqError, match=r"a\.safetensors"):
        read_weights(file)


def changed_config(tool: Any, folder: Path, part: str, **changes: Any) -> Path:
    files = dict(tool.model_files())
    config = json.loads(files["config.json"])
    config["quantization_config"][part] |= changes
    return write(folder, files | {"config.json": json.dumps(config).encode()})


@pytest.mark.parametrize(
    "arguments", [{"depth": 10**9}, {"embed_dim": 2**16}, {"img_size": 10**5}, {"depth": [1]}, {"num_classes": 10**9}]
)
def test_a_network_far_larger_than_its_weights(tool: Any, tmp_path: Path, arguments: dict[str, Any]) -> None:
    architecture = "vit_tiny_patch16_224"
    folder = changed_config(tool, tmp_path / "m", "model", architecture=architecture, arguments=arguments)
    with pytest.raises(dfq.DfqError, match=r"config\.json and model\.safetensors do not make a model: "):
        dfq.load(folder)


def test_quantizers_go_to_their_places_only(tool: Any, tmp_path: Path) -> None:
    files = dict(tool.model_files())
    config = json.loads(files["config.json"])["quantization_config"]
    site = next(name for name in config["sites"] if name.endswith(".input"))
    header, data = tool.split_safetensors(files["model.safetensors"])
    renamed = {
        name.replace(f"{site}.", "blocks.0.mlp.") if name.startswith(site) else name: header[name] for name in header
    }
    files["model.safetensors"] = tool.join_safetensors(renamed, data)
    whole = json.loads(files["config.json"])
    whole["quantization_config"]["sites"]["blocks.0.mlp"] = whole["quantization_config"]["sites"].pop(site)
    files["config.json"] = json.dumps(whole).encode()
    tool.seal_model(files)
    with pytest.raises(dfq.DfqError, match=r"blocks\.0\.mlp is no place for a quantizer"):
        dfq.load(write(tmp_path / "m", files))


def test_an_origin_of_other_values() -> None:
    known = Origin("tiny", "vit_tiny_patch16_224", {"depth": 2}, seed=3)
    assert Origin.from_dict(known.to_dict()) == known
    for key, value in {"name": 3, "arguments": [1], "seed": "1", "fingerprint": None, "random_weights": 1}.items():
        with pytest.raises(dfq.DfqError, match=f"{key} of the model's origin cannot be"):
            Origin.from_dict(known.to_dict() | {key: value})


@pytest.mark.parametrize("size", [(0, 32), (10**9, 32), (32,), ("32", "32"), (True, 32)])
def test_a_size_that_cannot_be_meant(size: Any) -> None:
    with pytest.raises(dfq.DfqError, match="image_size must be two whole numbers from 1 to 16384"):
        Preprocessing(size, (0.5,) * 3, (0.5,) * 3)


def test_a_crop_of_next_to_nothing() -> None:
    with pytest.raises(dfq.DfqError, match=r"crop_pct 1e-300 would have images enlarged to more than 16384 pixels"):
        Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, crop_pct=1e-300)


# Recipes


@pytest.mark.parametrize(
    "text",
    [
        "num_images = " + "9" * 5000,
        "num_images = 0x" + "f" * 5000,
        "damping = " + "[" * 100_000,
        "a." * 10**6 + "b = 1",
        "# " + "x" * 2**21,
        "summary = 1979-05-27",
        "name = {a = 1}",
    ],
)
def test_recipes(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"mine\.toml"):
        load_recipe(tmp_path / "mine.toml")


def test_an_error_does_not_repeat_a_megabyte() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict({"softmax": "x" * 10**6}, name="mine", where="mine.toml")
    assert len(str(caught.value)) < 200


# Folders


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "\0", "x" * 5000, "link.safetensors"])
def test_a_manifest_that_leads_elsewhere(tool: Any, tmp_path: Path, name: str) -> None:
    files = tool.set_files()
    outside = write(tmp_path, {"x": files["shard-00000.safetensors"]}) / "x"
    manifest = json.loads(files["manifest.json"])
    manifest["shards"][0]["file"] = name
    folder = write(tmp_path / "set", files | {"manifest.json": json.dumps(manifest).encode()})
    (folder / "link.safetensors").symlink_to(outside)
    with pytest.raises(dfq.DfqError, match=r"manifest\.json names .* which is not a file in"):
        dfq.load_calibration_set(folder)


def test_a_link_within_the_folder_is_followed(tool: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", tool.set_files())
    (folder / "shard-00000.safetensors").rename(folder / "elsewhere")
    (folder / "shard-00000.safetensors").symlink_to("elsewhere")
    assert len(dfq.load_calibration_set(folder)) == 8


@pytest.mark.parametrize("run", [{"mean": [10**400] * 3}, {"mean": [float("nan")] * 3}, {"std": [0, 1, 1]}])
def test_colours_that_are_no_numbers(tool: Any, tmp_path: Path, run: dict[str, Any]) -> None:
    files = tool.set_files()
    manifest = json.loads(files["manifest.json"])
    manifest["run"] |= run
    folder = write(tmp_path / "set", files | {"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(dfq.DfqError, match=r"shard-00000\.safetensors is damaged"):
        dfq.load_calibration_set(folder)


def test_shards_of_several_sizes(tool: Any, tmp_path: Path) -> None:
    files = dict(tool.set_files())
    header, data = tool.split_safetensors(files["shard-00000.safetensors"])
    count, channels, height, width = header["images"]["shape"]
    header["images"]["shape"] = [count, channels, height * 2, width // 2]
    files["shard-00000.safetensors"] = tool.join_safetensors(header, data)
    tool.seal_set(files)
    with pytest.raises(dfq.DfqError, match=r"manifest\.json is damaged: its shards hold images of several sizes"):
        dfq.load_calibration_set(write(tmp_path / "set", files))


def test_what_is_no_file_is_not_opened(tool: Any, tmp_path: Path) -> None:
    """A pipe nobody writes to would be waited for."""
    folder = write(tmp_path / "set", tool.set_files())
    for name in ("a.png", "mine.toml", "stages.partial", STATE):
        os.mkfifo(tmp_path / name)
    (folder / "shard-00000.safetensors").unlink()
    os.mkfifo(folder / "shard-00000.safetensors")
    with pytest.raises(dfq.DfqError, match=r"manifest\.json names 'shard-00000\.safetensors', which is not a file"):
        dfq.load_calibration_set(folder)
    tool.read_set_folder(folder)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(dfq.DfqError, match=r"cannot read .*manifest\.json: it is not a file"):
        SetFolder(folder, {}, {})
    with pytest.raises(dfq.DfqError, match=r"a\.png: it is not a file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(dfq.DfqError, match=r"mine\.toml: it is not a file"):
        load_recipe(tmp_path / "mine.toml")
    with pytest.raises(dfq.DfqError, match=r"stages\.partial is damaged, or of something else \(it is not a file\)"):
        ResumeFile(tmp_path / "stages.partial")
    with pytest.raises(dfq.DfqError, match=r"student\.partial is damaged \(it is not a file\)"):
        StateFile(tmp_path / STATE, {}).take_up(*tool.trainee())


def test_a_text_that_would_fill_the_memory(tool: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", tool.set_files())
    # All holes: it takes no room on the disk.
    os.truncate(folder / "manifest.json", 2**40)
    with pytest.raises(dfq.DfqError, match=r"cannot read .*manifest\.json: it has more than"):
        dfq.load_calibration_set(folder)


def test_a_folder_where_a_file_is_to_be_replaced(tool: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", tool.set_files())
    (folder / "shard-99999.safetensors").mkdir()
    with pytest.raises(dfq.DfqError, match=r"cannot delete .*shard-99999\.safetensors"):
        SetFolder(folder, {}, {}, overwrite=True)


ROUND = {"round": 1, "images": 8, "divergence": 0.5, "agreement": None, "top1": 3.5}
ROUND |= {"generating_seconds": 1.0, "training_seconds": 2}


def test_rounds() -> None:
    assert rounds_of([ROUND])[0].top1 == 3.5
    for key, value in {"top1": "3.5", "round": None, "divergence": float("nan"), "images": 10**400}.items():
        with pytest.raises(ValueError, match=f"{key} of a round cannot be"):
            rounds_of([ROUND | {key: value}])


def test_a_state_of_other_shapes_is_not_stretched(tool: Any, tmp_path: Path) -> None:
    files = dict(tool.state_files())
    header, data = tool.split_safetensors(files[STATE])
    entry = header["student.0.bias"]
    start = entry["data_offsets"][0]
    for other in header.values():
        if other.get("data_offsets", [0])[0] > start:
            other["data_offsets"] = [offset - 12 for offset in other["data_offsets"]]
    entry |= {"shape": [1], "data_offsets": [start, start + 4]}
    files[STATE] = tool.join_safetensors(header, data[: start + 4] + data[start + 16 :])
    with pytest.raises(dfq.DfqError, match=r"student\.partial is damaged \(0\.bias has shape \(1,\)"):
        StateFile(write(tmp_path, files) / STATE, {"seed": 0}).take_up(*tool.trainee())


@pytest.mark.parametrize("line", ["[" * 100_000, '{"round": 1}', "3", '{"round": ' + "9" * 5000 + "}"])
def test_a_log_of_something_else(tool: Any, tmp_path: Path, line: str) -> None:
    with pytest.raises(dfq.DfqError, match=r"log\.jsonl is damaged"):
        tool.read_transfer(write(tmp_path / "t", tool.transfer_files() | {"log.jsonl": line.encode()}))


# Networks in ONNX


@pytest.mark.parametrize("inner", [False, True])
def test_an_onnx_file_that_reads_others(tool: Any, tmp_path: Path, inner: bool) -> None:
    model = onnx.load_from_string(tool.onnx_files()["model.onnx"])
    tensor = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    if inner:
        graph = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
        model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=graph, else_branch=graph))
    else:
        model.graph.initializer.append(tensor)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(dfq.DfqError, match=r"model\.onnx has data in other files"):
        dfq.open_model(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "changes",
    [{"num_classes": float("inf")}, {"num_classes": -1}, {"recipe": 3}, {"seed": "x"}, {"model": {"name": 3}}],
)
def test_an_onnx_file_that_says_nonsense(tool: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = onnx.load_from_string(tool.onnx_files()["model.onnx"])
    note = model.metadata_props[0]
    note.value = json.dumps(json.loads(note.value) | changes)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(dfq.DfqError, match=r"model\.onnx is damaged"):
        dfq.open_model(tmp_path / "model.onnx")


# Pictures


def png(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, all black: compressed to a thousandth."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(height, 1000) * (1 + -(-width // 8))))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(50_000, 50_000), (10_000, 10_000)])
def test_a_picture_of_too_many_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(png(*size))
    with pytest.raises(dfq.DfqError, match=r"cannot read the image .*a\.png: .*pixels"):
        read_image(tmp_path / "a.png")


def test_a_strip_that_grows_when_it_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1_000_000, 1))
    with pytest.raises(dfq.DfqError, match=r"it has 1000000x1 pixels, and one side may be at most 100 times the other"):
        read_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(png(100, 1))
    assert read_image(tmp_path / "a.png").size == (100, 1)


def test_a_program_is_no_picture(tmp_path: Path) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    packed = io.BytesIO()
    Image.new("RGB", (8, 8)).save(packed, "EPS")
    (tmp_path / "a.png").write_bytes(packed.getvalue())
    with pytest.raises(dfq.DfqError, match=r"a\.png: it is in no known image format"):
        read_image(tmp_path / "a.png")


def test_folders_that_lead_into_themselves(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.png").touch()
    for name in ("b", "c", "d"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    assert images_below(tmp_path) == [tmp_path / "a" / "one.png"]
