"""Files in the formats of EDM, STF and torch: what the tests of the readers read.

The structure is that of `sedm_kit.rehearsal`; here are the variants that only old or unusual files have, and pickles by hand."""
import struct
import sys
from types import ModuleType
from unittest.mock import patch

import numpy as np

from sedm_kit import rehearsal
from sedm_kit.rehearsal import SOURCE, stand_in  # noqa: F401 (SOURCE and stand_in are to be had from here)


def scalar(kind, data):
    raise AssertionError("never called")


class EasyDict(dict):
    "A dictionary under the name that EDM's settings have."


class Numpy1:
    "A numpy number in the spelling of numpy 1."
    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return scalar, self.value.__reduce__()[1]


def like_edm(model, args=(), numpy_1=False):
    "A denoiser of ours as EDM's module tree."
    return rehearsal.like_edm(model, args, Numpy1(np.sqrt(0.5)) if numpy_1 else np.sqrt(0.5))


def write(path, content, how="pickle", protocol=4):
    "A file, written while numpy 1's module and that of EDM's settings exist too."
    modules = {name: ModuleType(name) for name in ("dnnlib", "dnnlib.util", "numpy.core", "numpy.core.multiarray")}
    for item, name in ((EasyDict, "dnnlib.util"), (scalar, "numpy.core.multiarray")):
        item.__module__ = name
        setattr(modules[name], item.__name__, item)
    with patch.dict(sys.modules, modules):
        return rehearsal.write_edm(path, content, how, protocol)


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
