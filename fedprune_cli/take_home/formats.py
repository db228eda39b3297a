"""The files that a model travels in: safetensors, torch.export and ONNX. Each holds its description, and none is unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch

from fedprune_cli.errors import ConfigError, DataError
from fedprune_cli.store.files import read_bytes
from fedprune_cli.store.state import Array
from fedprune_cli.take_home.description import KEY, Description, parse_description
from fedprune_cli.take_home.network import computing, example, rebuild
from fedprune_cli.take_home.take import Taken

MAX_BYTES = 2**33  # of a model
INPUTS, LOGITS, BATCH = "inputs", "logits", "batch"  # of the graph
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
NOT_AN_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
Predict = Callable[[Array], Array]  # samples [n, C, H, W] -> logits [n, classes]


@dataclass(frozen=True)
class Model:
    """A model that was read from a file: what is said of it, and what gives its logits."""

    description: Description
    logits: Predict


class Format(ABC):
    """A kind of file. suffix: of its name."""

    suffix: ClassVar[str]

    @abstractmethod
    def encode(self, taken: Taken) -> bytes:
        """Returns the file of a model; raises ConfigError when what it takes is not installed."""

    @abstractmethod
    def is_of(self, data: bytes) -> bool:
        """Whether a file begins like one of this kind."""

    @abstractmethod
    def decode(self, data: bytes, where: str) -> Model:
        """Returns the model in a file; raises DataError when it is damaged, or none of ours."""


class Safetensors(Format):
    """The weights by their names in PyTorch's layout, all else in one metadata key: a file for programs, which have the network."""

    suffix = ".safetensors"

    def encode(self, taken: Taken) -> bytes:
        from safetensors.torch import save

        weights = {name: value.contiguous() for name, value in taken.network.model.state_dict().items()}
        text = taken.description.as_json()
        # one metadata key: with several, safetensors writes them in a random order
        return bytes(save(weights, {KEY: json.dumps({"sha256": _digest(text, weights), "description": text})}))

    def is_of(self, data: bytes) -> bool:
        return data[8:9] == b"{"

    def decode(self, data: bytes, where: str) -> Model:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            weights = load(data)
            meta = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
            held = json.loads(meta[KEY]) if KEY in meta else {}
            text, sha256 = held.get("description"), held.get("sha256")
        except (SafetensorError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise DataError(f"{where}: damaged ({type(error).__name__})") from None
        description = parse_description(text, where)
        if sha256 != _digest(str(text), weights):
            raise DataError(f"{where}: damaged (its content does not match its checksum)")
        try:
            network = rebuild(description.model, len(description.labels), description.input, weights)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        return Model(description, _by_torch(network, description.precision))


def _digest(text: str, weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(weights):
        digest.update(f"{name}{tuple(weights[name].shape)}".encode() + weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _by_torch(network: Callable[[torch.Tensor], torch.Tensor], precision: str) -> Predict:
    def logits(samples: Array) -> Array:
        inputs = torch.from_numpy(np.ascontiguousarray(samples))
        with torch.inference_mode(), computing(precision):
            try:
                found = network(inputs)
            except ValueError:  # a GroupNorm of a very small slice, to which a single sample gives one value a group
                found = network(torch.cat([inputs, inputs]))[: len(inputs)]
        return found.float().numpy()

    return logits


class TorchExport(Format):
    """The network as PyTorch's exported program (`torch.export.load`), with any number of samples at a time."""

    suffix = ".pt2"
    described = "fedprune.json"

    def encode(self, taken: Taken) -> bytes:
        file, description = io.BytesIO(), taken.description
        with _unheard():
            torch.export.save(_program(taken), file, extra_files={self.described: description.as_json()})
        return file.getvalue()

    def is_of(self, data: bytes) -> bool:
        return data[:2] == b"PK"

    def decode(self, data: bytes, where: str) -> Model:
        description = parse_description(_check_archive(data, where, self.described), where)
        try:
            with _unheard():
                network = torch.export.load(io.BytesIO(data)).module()
            logits = _by_torch(network, "float32")
            found = logits(example(description.input, 2).numpy()).shape
        except Exception as error:  # whatever PyTorch makes of a file that was changed by hand
            raise DataError(f"{where}: damaged, or of another PyTorch ({type(error).__name__})") from None
        if found != (2, len(description.labels)):
            raise DataError(f"{where}: damaged (its network is not the one that it describes)")
        return Model(description, logits)


def _program(taken: Taken) -> torch.export.ExportedProgram:
    """Returns the network as a graph, without the lines of which file of this machine each of its nodes comes from."""
    program = torch.export.export(
        taken.network, (example(taken.description.input, 2),), dynamic_shapes=({0: torch.export.Dim(BATCH)},)
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _check_archive(data: bytes, where: str, described: str) -> bytes | None:
    """Returns the description in an archive of PyTorch's, None where there is none.

    Raises DataError for a damaged one, and for one from which PyTorch would unpickle: that runs whatever its maker wants.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if sum(one.file_size for one in archive.infolist()) > MAX_BYTES or (bad := archive.testzip()):
                raise DataError(f"{where}: damaged ({bad or 'too large'})")
            text = next((archive.read(name) for name in names if name.endswith(f"/extra/{described}")), None)
            pickled = [name for name in names if _is_pickled(name.partition("/")[2], archive.read(name))]
    except (*NOT_AN_ARCHIVE, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: damaged ({type(error).__name__})") from None
    if pickled:
        raise DataError(f"{where}: holds pickled objects, which could run anything: refused")
    return text


def _is_pickled(name: str, content: bytes) -> bool:
    """Whether PyTorch would unpickle a part of its archive, or what the part lists."""
    if name.endswith("_config.json"):
        return any(one.get("use_pickle") for one in json.loads(content)["config"].values())
    return name.startswith("data/constants/") and not name.startswith("data/constants/tensor_")


class Onnx(Format):
    """The network as an ONNX graph from raw samples to logits, for ONNX Runtime and others; its description in metadata_props."""

    suffix = ".onnx"

    def encode(self, taken: Taken) -> bytes:
        need_onnx()
        names = {"input_names": [INPUTS], "output_names": [LOGITS]}
        with _unheard():
            exported: Any = torch.onnx.export(_program(taken), (), dynamo=True, verbose=False, **names)  # type: ignore[arg-type]
            proto = exported.model_proto
        for node in proto.graph.node:
            del node.metadata_props[:]  # PyTorch's words on where each came from
        text = taken.description.as_json()
        _put(proto, KEY, text)
        _put(proto, f"{KEY}_sha256", hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest())
        return cast(bytes, proto.SerializeToString(deterministic=True))

    def is_of(self, data: bytes) -> bool:
        return data[:1] == b"\x08"  # the field that says the format's version

    def decode(self, data: bytes, where: str) -> Model:
        need_onnx()
        import onnx
        import onnxruntime as ort
        from google.protobuf.message import DecodeError

        try:
            proto = onnx.load_from_string(data)
            held = {one.key: one.value for one in proto.metadata_props}
        except (DecodeError, ValueError, UnicodeDecodeError) as error:
            raise DataError(f"{where}: damaged, or not ONNX ({type(error).__name__})") from None
        description = parse_description(held.get(KEY), where)
        left = [one for one in proto.metadata_props if one.key != f"{KEY}_sha256"]
        del proto.metadata_props[:]
        proto.metadata_props.extend(left)
        if hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest() != held.get(f"{KEY}_sha256"):
            raise DataError(f"{where}: damaged (its content does not match its checksum)")
        try:
            options = ort.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            options.log_severity_level = 4
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise DataError(f"{where}: ONNX Runtime refuses it ({type(error).__name__})") from None
        return Model(
            description, lambda samples: cast(Array, session.run([LOGITS], {INPUTS: np.ascontiguousarray(samples)})[0])
        )


def _put(proto: Any, key: str, value: str) -> None:
    entry = proto.metadata_props.add()
    entry.key, entry.value = key, value


def need_onnx() -> None:
    """Raises ConfigError when a package that ONNX takes is not installed."""
    for package in ONNX_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"onnx needs its extra ({package} is not installed): pip install 'fedprune[onnx]'")


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keeps from the screen what PyTorch says to those who write exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORMATS: dict[str, Format] = {"safetensors": Safetensors(), "torch.export": TorchExport(), "onnx": Onnx()}


def read_model(path: Path) -> Model:
    """Returns the model in a file of any format; raises DataError when it is none, is damaged, or of another origin."""
    data = read_bytes(path, MAX_BYTES, DataError)
    for kind in FORMATS.values():
        if kind.is_of(data):
            return kind.decode(data, str(path))
    raise DataError(f"{path}: not a model: neither safetensors, nor torch.export, nor ONNX")
