"""Files in the formats of EDM, STF and torch, written from stand-ins: what the tests of the readers read.

Nothing here is EDM's code: the classes are empty, and only the structure of the pickles is the same (each module reduces to a call
of `torch_utils.persistence._reconstruct_persistent_obj` with its attributes and a source text)."""
import contextlib
import pickle
import struct
import sys
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

SOURCE = "raise SystemExit('the source text of a checkpoint was run')\n"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("never called")


def scalar(kind, data):
    raise AssertionError("never called")


class EasyDict(dict):
    "A dictionary under the name that EDM's settings have."


@contextlib.contextmanager
def edm_names():
    "The modules of EDM's repository, and numpy 1's, exist while a file is written."
    modules = {name: ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util",
                                                   "numpy.core", "numpy.core.multiarray")}
    for item, name in ((_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util"), (scalar, "numpy.core.multiarray")):
        item.__module__ = name
        setattr(modules[name], item.__name__, item)
    with patch.dict(sys.modules, modules):
        yield


class Persistent(nn.Module):
    "Pickles itself as EDM's persistent objects do."
    def __reduce__(self):
        meta = dict(type="class", version=6, module_src=SOURCE, class_name=type(self).__name__, state=dict(vars(self)))
        return _reconstruct_persistent_obj, (meta,)


class Numpy1:
    "A numpy number in the spelling of numpy 1."
    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return scalar, self.value.__reduce__()[1]


def stand_in(class_name: str, args=(), kwargs=None, **attributes) -> Persistent:
    "An empty module of this name, with recorded arguments."
    module = type(class_name, (Persistent,), {})()
    module._init_args, module._init_kwargs = args, {} if kwargs is None else kwargs
    vars(module).update(attributes)
    return module


def like_edm(model: nn.Module, args=(), numpy_1=False) -> Persistent:
    "A denoiser of ours as EDM's module tree: same class name, arguments, names and tensors."
    kwargs = {key: value for key, value in model.config.items() if key not in ("img_resolution", "img_channels")[:len(args)]}
    root = stand_in(type(model).__name__, args, kwargs, img_resolution=model.img_resolution, use_fp16=False)
    scale = Numpy1(np.sqrt(0.5)) if numpy_1 else np.sqrt(0.5)
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        *path, last = name.split(".")
        module = root
        for depth, part in enumerate(path):
            if part not in module._modules:
                inner = nn.ModuleDict() if part in ("enc", "dec") else stand_in(model.config["model_type"] if depth == 0 else "Conv2d",
                                                                                 resample_filter=None, skip_scale=scale)
                module.add_module(part, inner)
            module = module._modules[part]
        if name in parameters:
            module.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))
        else:
            vars(module).pop(last, None)
            module.register_buffer(last, tensor.clone())
    for module in root.modules():
        if isinstance(module, Persistent) and "weight" in module._parameters:
            module._parameters.setdefault("bias", None)
            vars(module).pop("resample_filter", None)
            module._buffers.setdefault("resample_filter", None)  # unused filters are there as None
    return root


def write(path, content, how="pickle", protocol=4):
    "A plain pickle, or a file of torch.save in its newer or older format."
    with edm_names():
        if how == "pickle":
            path.write_bytes(pickle.dumps(content, protocol=protocol))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    return path


# ---- pickles by hand

STOP = b"."


def text(value: str) -> bytes:
    "Puts a string on the stack."
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    "Puts a whole number on the stack."
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def data(value: bytes) -> bytes:
    "Puts bytes on the stack."
    return b"B" + struct.pack("<I", len(value)) + value


def name(full: str) -> bytes:
    "Puts what a name stands for on the stack."
    module, _, attribute = full.rpartition(".")
    return text(module) + text(attribute) + b"\x93"


def many(*items: bytes) -> bytes:
    "Puts a tuple on the stack."
    return b"(" + b"".join(items) + b"t"


def call(function: str, *arguments: bytes) -> bytes:
    "Calls."
    return name(function) + many(*arguments) + b"R"


def mapping(**entries: bytes) -> bytes:
    "Puts a dictionary on the stack."
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def pickled(body: bytes) -> bytes:
    "A whole pickle with one value."
    return b"\x80\x04" + body + STOP


def network(**state: bytes) -> bytes:
    "A persistent object with these attributes."
    meta = mapping(type=text("class"), module_src=text(SOURCE), class_name=text("EDMPrecond"), state=mapping(**state))
    return call("torch_utils.persistence._reconstruct_persistent_obj", meta)


def storage(body: bytes | None = None, numbers: bytes = bytes(16), count: int = 4, announced: int | None = None) -> bytes:
    "A nested file of one float storage, as EDM's pickles have it for every tensor; `body` replaces its object."
    def part(value):
        return b"\x80\x02" + value + STOP
    identity = many(text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), integer(count), b"N") + b"Q"
    system = mapping(little_endian=b"\x88")
    announced = count if announced is None else announced
    return (part(integer(0x1950A86A20F9469CFC6C)) + part(integer(1001)) + part(system) + part(identity if body is None else body)
            + part(b"](" + text("0") + b"e") + struct.pack("<Q", announced) + numbers)


def tensor(file: bytes | None = None, offset=0, size=(4,), stride=(1,)) -> bytes:
    "A tensor on such a storage."
    memory = call("torch.storage._load_from_bytes", data(storage() if file is None else file))
    return call("torch._utils._rebuild_tensor_v2", memory, integer(offset), many(*map(integer, size)), many(*map(integer, stride)), b"\x89", b"N")
