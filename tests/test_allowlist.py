"""Reading pickles without running them: benign files are read exactly, hostile ones execute nothing and give one clear error."""
import copyreg
import io
import json
import os
import pickle
import struct
import sys
import warnings
import zipfile

import edm_files as files
import numpy as np
import pytest
import torch
from edm_files import call, data, integer, many, mapping, name, network, pickled, tensor, text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sedm_kit import allowlist, archives
from sedm_kit.allowlist import Machine, Noted, Storage, rebuild_tensor
from sedm_kit.archives import Recorded, read_file, read_module, read_state_dict

WATCHED = ("pickle.find_class", "import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
           "os.remove", "os.mkdir", "os.rename", "code.__new__", "function.__new__", "ctypes.dlopen", "socket.connect")
events, watching = [], False


def _watch(event, arguments):
    if watching and (event in WATCHED or event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
        events.append((event, arguments))


sys.addaudithook(_watch)  # Python itself reports what it runs, imports and writes


def watched(action):
    "Result or ValueError of an action during which Python must neither run, import, nor write anything."
    global watching
    modules = set(sys.modules)
    events.clear()
    watching = True
    try:
        result = action()
    except ValueError as error:
        result = error
    finally:
        watching = False
    assert not events, events
    assert set(sys.modules) == modules
    return result


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    "What the readers import on first use is imported before anything is watched."
    path = tmp_path_factory.mktemp("warm") / "a.pt"
    torch.save({"a": torch.ones(1)}, path)
    read_state_dict(path)
    "name".encode("cp437")  # the coding of names in a zip archive


class Net(nn.Module):
    "A small network with everything EDM's have: containers, buffers, unused entries."
    img_resolution, config = 8, {"model_type": "SongUNet", "img_resolution": 8, "img_channels": 1, "sigma_data": 0.5}

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.map_noise = nn.Module()
        self.model.map_noise.register_buffer("freqs", torch.randn(4))
        self.model.enc = nn.ModuleDict({"8x8_conv": nn.Conv2d(1, 4, 3), "4x4_down": nn.Conv2d(4, 4, 3, bias=False)})
        self.model.enc["4x4_down"].register_buffer("resample_filter", torch.ones(1, 1, 2, 2) / 4)


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())


# ---- benign files

@pytest.mark.parametrize("how, protocol", [("pickle", 3), ("pickle", 4), ("pickle", 5), ("zip", 2), ("legacy", 2)])
@pytest.mark.parametrize("numpy_1", [False, True])
def test_networks_are_read_exactly(how, protocol, numpy_1, tmp_path):
    net = Net()
    path = files.write(tmp_path / "a.pkl", {"ema": files.like_edm(net, numpy_1=numpy_1)}, how, protocol)
    found = watched(lambda: read_module(path))
    assert isinstance(found, Recorded) and found.class_name == "Net" and found.parts == {"model": "SongUNet"}
    assert found.arguments == net.config and found.positional == ()
    assert same(found.tensors, net.state_dict())


def test_both_spellings_of_numpy_are_in_the_files(tmp_path):
    for numpy_1, spelling in ((True, b"numpy.core.multiarray"), (False, b"numpy._core.multiarray")):
        path = files.write(tmp_path / "a.pkl", {"ema": files.like_edm(Net(), numpy_1=numpy_1)})
        assert spelling in path.read_bytes() and b"torch_utils.persistence" in path.read_bytes()


@pytest.mark.parametrize("how", ["pickle", "zip", "legacy"])
def test_whole_snapshots_and_training_states(how, tmp_path):
    net, optimizer = Net(), {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}]}
    content = {"optimizer_state": optimizer, "step": 7, "net": files.like_edm(net), "loss_fn": files.stand_in("EDMLoss", P_mean=-1.2),
               "dataset_kwargs": files.EasyDict(path="a.zip", use_labels=False), "augment_pipe": None}
    path = files.write(tmp_path / "a.pt", content, how)
    found = read_file(path)
    assert found["dataset_kwargs"] == {"path": "a.zip", "use_labels": False} and found["step"] == 7
    assert found["optimizer_state"]["param_groups"] == optimizer["param_groups"]
    assert torch.equal(found["optimizer_state"]["state"][0]["exp_avg"], torch.ones(2))
    assert same(read_module(path).tensors, net.state_dict()) and same(read_module(path, "net").tensors, net.state_dict())


def test_ema_comes_before_net(tmp_path):
    net, ema = Net(), Net()
    path = files.write(tmp_path / "a.pkl", {"net": files.like_edm(net), "ema": files.like_edm(ema)})
    assert same(read_module(path).tensors, ema.state_dict()) and same(read_module(path, "net").tensors, net.state_dict())


@pytest.mark.parametrize("new", [True, False])
def test_state_dicts_of_all_types_are_what_torch_reads(new, tmp_path):
    base = torch.arange(24).reshape(4, 6)
    state = {str(dtype): (base % 2).to(dtype) if dtype == torch.bool else base.to(dtype) for dtype in allowlist.DTYPES.values()}
    state |= {"view": state["torch.float32"][1:, ::2], "transposed": state["torch.float32"].T, "empty": torch.empty(0, 3), "number": torch.tensor(2.5),
              "parameter": nn.Parameter(torch.randn(3)), "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    expected = torch.load(tmp_path / "a.pt", weights_only=True)
    assert same(watched(lambda: read_state_dict(tmp_path / "a.pt")), expected)


def test_state_dicts_of_modules_with_their_metadata(tmp_path):
    state = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).state_dict()
    assert "_metadata" in vars(state)
    torch.save(state, tmp_path / "a.pt")
    assert same(read_state_dict(tmp_path / "a.pt"), dict(state))


plain = st.recursive(st.none() | st.booleans() | st.integers(-2**100, 2**100) | st.floats(allow_nan=False) | st.text(max_size=20) | st.binary(max_size=20),
                     lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.sets(st.text(max_size=3), max_size=3)
                     | st.dictionaries(st.text(max_size=5) | st.integers(-2**31 + 1, 2**31 - 1), inner, max_size=4), max_leaves=12)


@settings(max_examples=150)
@given(value=plain, protocol=st.integers(3, 5))
def test_plain_data_is_what_python_reads(value, protocol):
    found = Machine().run(io.BytesIO(pickle.dumps(value, protocol)))
    assert found == value and repr(found) == repr(pickle.loads(pickle.dumps(value)))  # repr tells 1 from 1.0 and True


@pytest.mark.parametrize("value", [np.float64(0.1), np.float32(0.1), np.int64(-5), np.uint8(200), np.bool_(True), np.float16(2.5)])
def test_numpy_numbers_become_pythons(value):
    for protocol in (2, 4):
        found = Machine().run(io.BytesIO(pickle.dumps(value, protocol)))
        assert type(found) is type(value.item()) and found == value


@settings(max_examples=100)
@given(offset=st.integers(-2, 8), size=st.lists(st.integers(-1, 5), max_size=3).map(tuple), stride=st.lists(st.integers(-1, 6), max_size=3).map(tuple))
def test_a_tensor_is_either_inside_its_storage_or_refused(offset, size, stride):
    memory = torch.arange(6.0)
    try:
        found = rebuild_tensor(Storage(memory), offset, size, stride)
    except ValueError:
        inside = len(size) == len(stride) and min((offset, *size, *stride)) >= 0
        if inside:
            indices = offset + sum(np.ix_(*[np.arange(n) * step for n, step in zip(size, stride)]), np.zeros((), int))
            assert np.size(indices) > 6 or np.size(indices) and indices.max() > 5 or not np.size(indices) and offset > 6
        return
    assert torch.equal(found, memory.as_strided(size, stride, offset)) and found.numel() <= 6


# ---- hostile files

class Canary:
    "Creates a file if it is ever run, by several ways of reducing."
    def __init__(self, path, way):
        self.path, self.way = str(path), way

    def __reduce__(self):
        import subprocess
        code = f"open({self.path!r}, 'w').close()"
        return {"os.system": (os.system, (f"touch {self.path}",)), "subprocess": (subprocess.Popen, (["touch", self.path],)),
                "eval": (eval, (code,)), "exec": (exec, (code,)), "open": (open, (self.path, "w")), "mkdir": (os.mkdir, (self.path,)),
                "import": (__import__, ("antigravity",)), "torch.load": (torch.load, (self.path,)),
                "compile": (compile, (code, "x", "exec"))}[self.way]


def touching(canary, function="posix.system") -> bytes:
    return call(function, text(f"touch {canary}"))


def zipped(entries: dict, compression=zipfile.ZIP_STORED) -> bytes:
    "A zip archive."
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about entries of the same name
        for key, value in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(key, value)
    return stream.getvalue()


IN_ZIP = many(text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), integer(4)) + b"Q"
ZIP_TENSOR = call("torch._utils._rebuild_tensor_v2", IN_ZIP, integer(0), many(integer(4)), many(integer(1)), b"\x89", b"N")
ZIP = {"a/data.pkl": pickled(mapping(w=ZIP_TENSOR)), "a/data/0": bytes(16)}
LAUGHS = b"(](K\x01K\x02e\x94" + b"".join(b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(60)) + b"t"  # 2^60 leaves
LOOP = b"](" + text("a") + b"e\x940" + b"h\x00" + b"h\x00a"  # a list that holds itself
INNER = "torch.storage._load_from_bytes"
TWO_PARTS = b"(" + text("a") + b"h\x00" + text("b") + b"h\x00u"
MODULE_LOOP = name("torch.nn.modules.container.ModuleDict") + b")\x81\x94" + mapping(_modules=b"}" + TWO_PARTS) + b"b"
HASH_BOMB = b")\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60))

HOSTILE = {
    # calls of foreign code
    **{way: lambda canary, way=way: pickle.dumps({"ema": Canary(canary, way)}) for way in
       ("os.system", "subprocess", "eval", "exec", "open", "mkdir", "import", "torch.load", "compile")},
    "getattr": lambda canary: pickled(call("builtins.getattr", call("builtins.__import__", text("os")), text("system")) + many(text(f"touch {canary}")) + b"R"),
    "posix.system by hand": lambda canary: pickled(mapping(ema=touching(canary))),
    "in protocol 0": lambda canary: pickle.dumps({"ema": Canary(canary, "os.system")}, 0),
    "in protocol 2": lambda canary: pickle.dumps({"ema": Canary(canary, "os.system")}, 2),
    "INST": lambda canary: b"\x80\x02(" + text(f"touch {canary}") + b"iposix\nsystem\n.",
    "OBJ": lambda canary: b"\x80\x02(" + name("posix.system") + text(f"touch {canary}") + b"o.",
    "NEWOBJ": lambda canary: pickled(name("posix.system") + many(text(f"touch {canary}")) + b"\x81"),
    "NEWOBJ_EX": lambda canary: pickled(name("posix.system") + many(text(f"touch {canary}")) + b"}\x92"),
    "a dotted name": lambda canary: pickled(text("torch.serialization") + text("os.system") + b"\x93" + many(text(f"touch {canary}")) + b"R"),
    "an allowed module's other function": lambda canary: pickled(call("torch.storage.io.open", text(str(canary)), text("w"))),
    "torch.hub": lambda canary: pickled(call("torch.hub.load", text("a/b"), text("c"))),
    "numpy.load": lambda canary: pickled(call("numpy.load", text(str(canary)), b"N", b"\x88")),
    "functools.partial": lambda canary: pickled(call("functools.partial", name("posix.system"))),
    "codecs": lambda canary: pickled(call("_codecs.encode", text("import os"), text("rot13"))),
    "EXT1": lambda canary: b"\x80\x02\x82\xf0" + many(text(f"touch {canary}")) + b"R.",
    "EXT4": lambda canary: b"\x80\x02\x84\xf0\x00\x00\x00" + many(text(f"touch {canary}")) + b"R.",
    # payloads inside tensors
    "in a nested storage": lambda canary: pickled(mapping(ema=call(INNER, data(files.storage(touching(canary)))))),
    "instead of a nested storage": lambda canary: pickled(mapping(ema=call(INNER, data(pickle.dumps(Canary(canary, "os.system")))))),
    "a nested zip": lambda canary: pickled(call(INNER, data(zipped({"a/data.pkl": pickle.dumps(Canary(canary, "os.system"))})))),
    "nested in nested": lambda canary: pickled(call(INNER, data(files.storage(call(INNER, data(files.storage())))))),
    "in the list of storages": lambda canary: pickled(call(INNER, data(files.storage().replace(b"](X\1\0\0\x000e", touching(canary))))),
    "in the system's description": lambda canary: pickled(call(INNER, data(files.storage().replace(mapping(little_endian=b"\x88"), touching(canary))))),
    "in an archive": lambda canary: zipped({**ZIP, "a/data.pkl": pickled(touching(canary))}),
    "in an archive's persistent id": lambda canary: zipped({**ZIP, "a/data.pkl": pickled(touching(canary) + b"Q")}),
    "in the older format": lambda canary: files.storage(touching(canary)),
    # tricks with what is allowed
    "arguments for OrderedDict": lambda canary: pickled(call("collections.OrderedDict", b"](" + many(text("a"), integer(1)) + b"e")),
    "arguments for ModuleDict": lambda canary: pickled(call("torch.nn.modules.container.ModuleDict", mapping(a=integer(1)))),
    "attributes of a function": lambda canary: pickled(name("torch._utils._rebuild_parameter") + mapping(__code__=b"N") + b"b"),
    "attributes of a class": lambda canary: pickled(name("torch.nn.modules.container.ModuleDict") + mapping(forward=name("torch._utils._rebuild_parameter")) + b"b"),
    "slots of an object": lambda canary: pickled(name("torch.nn.modules.container.ModuleDict") + b")\x81N" + mapping(__class__=b"N") + b"\x86b"),
    "__setstate__ of a list": lambda canary: pickled(b"]" + mapping(__setstate__=b"N") + b"b"),
    "attributes of a tensor": lambda canary: pickled(tensor() + mapping(data=b"N") + b"b"),
    "items of a tensor": lambda canary: pickled(tensor() + integer(0) + integer(9) + b"s"),
    "items of a name": lambda canary: pickled(name("collections.OrderedDict") + text("a") + integer(1) + b"s"),
    "appending to a name": lambda canary: pickled(name("collections.OrderedDict") + integer(1) + b"a"),
    "a storage's type is called": lambda canary: pickled(call("torch.FloatStorage", integer(10**9))),
    "a string is called": lambda canary: pickled(text("posix.system") + many(text(f"touch {canary}")) + b"R"),
    "a name of no strings": lambda canary: pickled(integer(1) + integer(2) + b"\x93"),
    "a network's arguments are objects": lambda canary: pickled(mapping(ema=network(_init_kwargs=mapping(a=tensor())))),
    "a network's arguments are a name": lambda canary: pickled(mapping(ema=network(_init_kwargs=name("collections.OrderedDict")))),
    "a network's parts are numbers": lambda canary: pickled(mapping(ema=network(_modules=mapping(a=integer(1))))),
    "a network's parameters are strings": lambda canary: pickled(mapping(ema=network(_parameters=mapping(a=text("a"))))),
    "a network's parts have dotted names": lambda canary: pickled(mapping(ema=network(_modules=b"}" + text("a.b") + network() + b"s"))),
    # sizes
    "a size of 2^39": lambda canary: pickled(tensor(size=(2**39,))),
    "sizes that overflow": lambda canary: pickled(tensor(size=(2**39, 2**39))),
    "a stride of 0": lambda canary: pickled(tensor(size=(10**9,), stride=(0,))),
    "a negative offset": lambda canary: pickled(tensor(offset=-1)),
    "a negative stride": lambda canary: pickled(tensor(offset=3, stride=(-1,))),
    "an offset behind the end": lambda canary: pickled(tensor(offset=1)),
    "an empty tensor far outside": lambda canary: pickled(tensor(offset=2**39, size=(0,))),
    "a size that is no number": lambda canary: pickled(call("torch._utils._rebuild_tensor_v2", call(INNER, data(files.storage())), integer(0), many(text("4")), many(integer(1)))),
    "a tensor of a list": lambda canary: pickled(call("torch._utils._rebuild_tensor_v2", b"]", integer(0), many(integer(4)), many(integer(1)))),
    "a storage of 2^39 numbers": lambda canary: pickled(tensor(files.storage(count=2**39))),
    "a storage that announces 2^63 numbers": lambda canary: pickled(tensor(files.storage(announced=2**63))),
    "a storage with fewer bytes": lambda canary: pickled(tensor(files.storage(numbers=bytes(15)))),
    "bytes of 2^60": lambda canary: b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc",
    "a string of 2^60": lambda canary: b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"abc",
    "a whole number of 80 000 bits": lambda canary: pickled(b"\x8b" + struct.pack("<i", 10_000) + b"\x7f" * 10_000),
    "the same storage a thousand times": lambda canary: pickled(b"]0" + data(files.storage(numbers=bytes(40_000), count=10_000)) + b"\x940("
                                                                + (name(INNER) + b"h\x00\x85R") * 1000 + b"t"),
    "views that do not fit into the file": lambda canary: pickled(b"]0" + call(INNER, data(files.storage(numbers=bytes(40_000), count=10_000))) + b"\x940" + mapping(
        ema=network(_parameters=b"}(" + b"".join(text(f"p{i}") + name("torch._utils._rebuild_tensor_v2") + b"(h\x00" + integer(0) + many(integer(10_000)) + many(integer(1)) + b"tR"
                                                 for i in range(99)) + b"u"))),
    # numpy
    "numpy objects": lambda canary: pickled(call("numpy.core.multiarray.scalar", call("numpy.dtype", text("O8")), data(bytes(8)))),
    "a number of 10^9 bytes": lambda canary: pickled(call("numpy.dtype", text("V1000000000"))),
    "a number of the wrong length": lambda canary: pickled(call("numpy.core.multiarray.scalar", call("numpy.dtype", text("f8")), data(bytes(7)))),
    "big-endian numbers": lambda canary: pickled(call("numpy.dtype", text("f8")) + many(integer(3), text(">")) + b"b"),
    # bombs and loops
    "2^60 arguments by sharing": lambda canary: pickled(LAUGHS + b"0" + mapping(ema=network(_init_args=b"h\x3c"))),
    "a list in itself as arguments": lambda canary: pickled(LOOP + b"0" + mapping(ema=network(_init_args=b"h\x00"))),
    "modules within themselves": lambda canary: pickled(MODULE_LOOP + b"0" + mapping(ema=network(_modules=mapping(m=b"h\x00")))),
    "a key that takes 2^60 steps to hash": lambda canary: pickled(HASH_BOMB + b"0}h\x3cNs"),
    "keys that collide": lambda canary: pickled(b"}(" + b"".join(integer(i * (2**61 - 1)) + b"N" for i in range(9)) + b"u"),
    "a set of a dictionary": lambda canary: pickled(call("builtins.set", b"}")),
    "a large set": lambda canary: pickled(call("builtins.set", b"](" + integer(1) * 17 + b"e")),
    "memo entries that are not there": lambda canary: pickled(b"h\x07"),
    "an empty stack": lambda canary: b"\x80\x04.",
    "two values": lambda canary: pickled(b"NN"),
    "an open mark": lambda canary: pickled(b"(N"),
    "a lonely end of a tuple": lambda canary: pickled(b"t"),
    "REDUCE of nothing": lambda canary: pickled(b"R"),
    "an unknown instruction": lambda canary: pickled(b"\xff"),
    # persistent ids where there are none, or others than torch's
    "a persistent id in a plain pickle": lambda canary: pickled(mapping(ema=text("a") + b"Q")),
    "a textual persistent id": lambda canary: b"\x80\x02Pabc\n.",
    "a persistent id that is a string": lambda canary: zipped({**ZIP, "a/data.pkl": pickled(text("storage") + b"Q")}),
    "a persistent id of another kind": lambda canary: zipped({**ZIP, "a/data.pkl": pickled(many(text("tensor"), name("torch.FloatStorage"), text("0"), text("cpu"), integer(4)) + b"Q")}),
    "a storage without a type": lambda canary: zipped({**ZIP, "a/data.pkl": pickled(IN_ZIP.replace(name("torch.FloatStorage"), text("float")))}),
    "a storage of strange size": lambda canary: zipped({**ZIP, "a/data.pkl": pickled(IN_ZIP.replace(integer(4), integer(-4)))}),
    # archives
    "an entry that climbs out": lambda canary: zipped({**ZIP, "a/../../canary": b"x"}),
    "an absolute entry": lambda canary: zipped({**ZIP, str(canary): b"x"}),
    "an entry of another folder": lambda canary: zipped({**ZIP, "b/data/0": b"x"}),
    "a storage outside of the archive": lambda canary: zipped({**ZIP, "a/data.pkl": ZIP["a/data.pkl"].replace(text("0"), text("../../../x"))}),
    "a missing storage": lambda canary: zipped({"a/data.pkl": ZIP["a/data.pkl"]}),
    "a storage that is too short": lambda canary: zipped({**ZIP, "a/data/0": bytes(15)}),
    "a storage that is too long": lambda canary: zipped({**ZIP, "a/data/0": bytes(17)}),
    "no data.pkl": lambda canary: zipped({"a/data/0": bytes(16)}),
    "two data.pkl": lambda canary: zipped({**ZIP, "a/b/data.pkl": b"x"}),
    "the same entry twice": lambda canary: zipped([*ZIP.items(), ("a/data/0", bytes(16))]),
    "a zip bomb": lambda canary: zipped({**ZIP, "a/data/1": bytes(10**7)}, zipfile.ZIP_DEFLATED),
    "TorchScript": lambda canary: zipped({**ZIP, "a/constants.pkl": b"x", "a/code/a.py": b"x"}),
    "big-endian": lambda canary: zipped({**ZIP, "a/byteorder": b"big"}),
    "a flipped bit": lambda canary: zipped({**ZIP, "a/data/0": b"Q" * 16}).replace(b"Q" * 16, b"Q" * 15 + b"R"),
    "half an archive": lambda canary: zipped(ZIP)[:100],
    "an archive without its start": lambda canary: b"PK\3\4" + zipped(ZIP)[60:],
    "an archive of images": lambda canary: zipped({"00000/img00000000.png": b"x", "dataset.json": b"{}"}),
    # other files
    "an empty file": lambda canary: b"",
    "one byte": lambda canary: b"\x80",
    "a picture": lambda canary: b"GIF89a" + bytes(100),
    "safetensors": lambda canary: struct.pack("<Q", 2) + b"{}",
    "JSON": lambda canary: json.dumps({"ema": 1}).encode(),
    "a program": lambda canary: f"import os\nos.system('touch {canary}')\n".encode(),
    "a pickle of protocol 6": lambda canary: b"\x80\x06N.",
    # keys
    "no network": lambda canary: pickle.dumps({"model": 1, "step": 2}),
    "a state dict instead of a network": lambda canary: pickle.dumps({"ema": {"a": 1}}),
    "a list": lambda canary: pickle.dumps([1, 2]),
    "nothing": lambda canary: pickle.dumps({}),
}


REASONS = {  # so that each file fails for the reason that it was made for, not for a slip in the making
    "it refers to what a checkpoint has no need of: 'posix.system'": (
        "os.system", "posix.system by hand", "in protocol 2", "OBJ", "NEWOBJ", "NEWOBJ_EX", "in a nested storage", "instead of a nested storage",
        "in the list of storages", "in the system's description", "in an archive", "in an archive's persistent id", "in the older format"),
    "'subprocess.Popen'": ("subprocess",), "'builtins.eval'": ("eval",), "'builtins.exec'": ("exec",), "'io.open'": ("open",),
    "'posix.mkdir'": ("mkdir",), "'builtins.__import__'": ("import",), "'builtins.getattr', 'builtins.__import__'": ("getattr",),
    "'torch.serialization.load'": ("torch.load",), "'builtins.compile'": ("compile",), "'torch.serialization.os.system'": ("a dotted name",),
    "'torch.storage.io.open'": ("an allowed module's other function",), "'torch.hub.load'": ("torch.hub",), "'numpy.load'": ("numpy.load",),
    "'functools.partial', 'posix.system'": ("functools.partial",),
    "this instruction is not used by checkpoints": ("INST", "EXT1", "EXT4", "a textual persistent id"),
    "_codecs.encode is known for the bytes of single numbers only": ("codecs",),
    "'ascii' codec can't decode": ("a nested zip",), "a nested storage in the wrong place": ("nested in nested",),
    "takes 0 positional arguments but 1 was given": ("arguments for OrderedDict", "arguments for ModuleDict"),
    "attributes are set on a Name": ("attributes of a function", "attributes of a class"), "attributes are set on a Noted": ("slots of an object",),
    "attributes are set on a list": ("__setstate__ of a list",), "attributes are set on a Tensor": ("attributes of a tensor",),
    "items are put into a Tensor": ("items of a tensor",), "items are put into a Name": ("items of a name",),
    "values are appended to a Name": ("appending to a name",), "torch.FloatStorage is called": ("a storage's type is called",),
    "something is called that is not a name": ("a string is called",), "a name is not made of strings": ("a name of no strings",),
    "an argument of a network is a Tensor": ("a network's arguments are objects",),
    "the arguments of 'EDMPrecond' are no list and dictionary": ("a network's arguments are a name",),
    "'a' in _modules of 'EDMPrecond' is a int": ("a network's parts are numbers",),
    "'a' in _parameters of 'EDMPrecond' is a str": ("a network's parameters are strings",),
    "_modules of 'EDMPrecond' is no dictionary of names": ("a network's parts have dotted names",),
    "does not lie within its storage of 4 elements": ("a size of 2^39", "a stride of 0", "an offset behind the end", "an empty tensor far outside"),
    "a tensor has the offset": ("sizes that overflow", "a negative offset", "a negative stride", "a size that is no number"),
    "a tensor is not made of storage, size and stride": ("a tensor of a list",),
    "has another size than its objects say": ("a storage that announces 2^63 numbers",),
    "a storage should have 549755813888 numbers of 4 bytes, and has 16 bytes": ("a storage of 2^39 numbers",),
    "a storage should have 4 numbers of 4 bytes, and has 1": ("a storage with fewer bytes", "a storage that is too short", "a storage that is too long"),
    "but only 3 remain": ("bytes of 2^60", "a string of 2^60"), "a whole number of 79999 bits": ("a whole number of 80 000 bits",),
    "its nested storages are larger than the file": ("the same storage a thousand times",),
    "its tensors have 3960000 bytes, and the file has": ("views that do not fit into the file",),
    "'O8' is no type of numbers": ("numpy objects",), "'V1000000000' is no type of numbers": ("a number of 10^9 bytes",),
    "a numpy number is not made of a type and its bytes": ("a number of the wrong length",),
    "attributes are set on a NumberType": ("big-endian numbers",),
    "a network has more than 10000 values as arguments": ("2^60 arguments by sharing", "a list in itself as arguments"),
    "its modules go on without end": ("modules within themselves",),
    "a key is neither a string nor a small whole number": ("a key that takes 2^60 steps to hash", "keys that collide"),
    "a set is not made of a short list": ("a set of a dictionary", "a large set"), "BINGET at byte 2": ("memo entries that are not there",),
    "it does not end with one value": ("an empty stack", "two values", "an open mark"), "pop from empty list": ("a lonely end of a tuple",),
    "the stack is empty": ("REDUCE of nothing",), "opcode b'": ("an unknown instruction",),
    "it points to storages, but is no archive": ("a persistent id in a plain pickle",),
    "a storage is not described in torch's way": ("a persistent id that is a string", "a persistent id of another kind", "a storage without a type"),
    "name '0' and -4 elements": ("a storage of strange size",),
    "its zip archive has entries that torch.save never writes": ("an entry that climbs out", "an absolute entry", "an entry of another folder", "the same entry twice"),
    "There is no item named 'a/data/../../../x'": ("a storage outside of the archive",), "There is no item named 'a/data/0'": ("a missing storage",),
    "it has 0 data.pkl, not 1": ("no data.pkl", "an archive of images"), "it has 2 data.pkl, not 1": ("two data.pkl",),
    "compressed, encrypted or larger inside than outside": ("a zip bomb",), "it is a TorchScript archive": ("TorchScript",),
    "its numbers are b'big'-endian": ("big-endian",), "Bad CRC-32": ("a flipped bit",),
    "its zip archive is damaged": ("half an archive", "an archive without its start"), "it is empty": ("an empty file",),
    "like neither a pickle nor a file that torch.save wrote": ("in protocol 0", "one byte", "a picture", "safetensors", "JSON", "a program", "a pickle of protocol 6"),
    "it has no entry 'ema' or 'net'; there is 'model', 'step'": ("no network",), "there is nothing": ("nothing",),
    "it has no network, but a dict, as 'ema'": ("a state dict instead of a network",), "it holds a list, not a dictionary with networks": ("a list",),
}
REASONS = {kind: words for words, kinds in REASONS.items() for kind in kinds}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_execute_nothing_and_are_refused(kind, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "stranger.pkl"
    path.write_bytes(HOSTILE[kind](canary))
    copyreg.add_extension("posix", "system", 240)
    try:
        error = watched(lambda: read_module(path))
    finally:
        copyreg.remove_extension("posix", "system", 240)
    assert isinstance(error, ValueError), f"was read as {error}"
    assert str(error).startswith(f"cannot read {path}: ") and REASONS[kind] in str(error).replace("\\'", "'")
    assert str(error).isprintable() and len(str(error)) < 700 + len(str(path)) and str(error).count(str(path)) == 1
    assert sorted(tmp_path.iterdir()) == [path]


def test_there_are_more_than_enough_hostile_files():
    assert len(HOSTILE) > 100 and REASONS.keys() == HOSTILE.keys()


@pytest.mark.parametrize("way", ["os.system", "subprocess", "open", "exec"])
def test_the_canary_sings_in_pythons_own_unpickler(way, tmp_path):
    "So that a silent canary means something."
    result = pickle.loads(HOSTILE[way](tmp_path / "canary"))["ema"]
    if way == "subprocess":
        result.wait()
    assert (tmp_path / "canary").exists()


def test_the_first_five_unknown_names(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickled(mapping(**{f"x{i}": call(f"strange.thing{i}", integer(1)) + mapping(a=b"N") + b"b" for i in range(8)})))
    with pytest.raises(ValueError, match="'strange.thing0', 'strange.thing1', 'strange.thing2', 'strange.thing3', 'strange.thing4' and 3 more"):
        read_file(tmp_path / "a.pkl")


def test_names_cannot_fool_a_terminal(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickled(call("evil\x1b[2J\n" + "x" * 1000 + ".f")))
    with pytest.raises(ValueError) as caught:
        read_file(tmp_path / "a.pkl")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300 + len(str(tmp_path))


def test_hostile_source_text_is_data(tmp_path):
    path = files.write(tmp_path / "a.pkl", {"ema": files.like_edm(Net())})
    assert files.SOURCE.encode() in path.read_bytes()
    assert isinstance(watched(lambda: read_module(path)), Recorded)


def test_strange_attributes_of_a_module_stay_data(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickled(mapping(ema=network(__class__=text("x"), __setstate__=integer(1), forward=text("y"), state=b"}"))))
    found = watched(lambda: read_file(tmp_path / "a.pkl"))["ema"]
    assert type(found) is Noted and found.state["__class__"] == "x" and found.class_name == "EDMPrecond"


def test_too_many_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr(allowlist, "INSTRUCTIONS", 1000)
    (tmp_path / "a.pkl").write_bytes(pickled(b"N0" * 1000 + b"N"))
    with pytest.raises(ValueError, match="too many instructions"):
        read_file(tmp_path / "a.pkl")


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "nothing.pkl", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file at"):
            read_file(path)


@pytest.mark.parametrize("content, words", [
    ({"a": torch.ones(2), "b": 3}, "holds a Tensor, a int"), ([torch.ones(2)], "holds a list"), ({}, "holds nothing"), ({"ema": {"a": torch.ones(1)}}, "holds a dict")])
def test_what_is_no_state_dict(content, words, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=words):
        read_state_dict(tmp_path / "a.pt")


# ---- broken files

@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    "The same network in the three formats."
    folder = tmp_path_factory.mktemp("wholes")
    return {how: files.write(folder / how, {"ema": files.like_edm(Net())}, how).read_bytes() for how in ("pickle", "zip", "legacy")}


@pytest.mark.parametrize("how", ["pickle", "zip", "legacy"])
def test_every_truncation_is_one_clear_error(how, wholes, tmp_path):
    whole, path = wholes[how], tmp_path / "a.pkl"
    for length in {*range(0, 40), *range(40, len(whole), len(whole) // 60), len(whole) - 1}:
        path.write_bytes(whole[:length])
        error = watched(lambda: read_module(path))
        assert isinstance(error, ValueError) and str(error).startswith(f"cannot read {path}: "), (length, error)


@pytest.mark.parametrize("how", ["pickle", "zip", "legacy"])
@settings(max_examples=100)
@given(changes=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_give_a_network_or_one_clear_error(how, changes, wholes, tmp_path_factory):
    spoiled = bytearray(wholes[how])
    for position, value in changes:
        spoiled[position % len(spoiled)] = value
    path = tmp_path_factory.mktemp("spoiled") / "a.pkl"
    path.write_bytes(bytes(spoiled))
    assert isinstance(watched(lambda: read_module(path)), (ValueError, Recorded))


PIECES = [b"(", b")", b"]", b"}", b"\x8f", b"N", b"\x88", b"K\x01", b"\x94", b"h\x00", b"h\x01", b"R", b"\x81", b"b", b"s", b"u", b"a", b"e", b"\x90", b"t", b"\x85",
          b"\x86", b"\x87", b"0", b"1", b"2", b"Q", text("a"), data(b"x"), data(files.storage()), tensor(), network(), *map(name, [*allowlist.CALLS, *allowlist.NOT_CALLED])]


@settings(max_examples=400)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=25))
def test_any_program_gives_data_or_one_error(pieces, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "program.pkl"
    path.write_bytes(pickled(b"".join(pieces)))
    watched(lambda: read_file(path))


def test_no_living_object_is_in_what_is_read(wholes, tmp_path):
    "Only the plain types, tensors and Noted: nothing that carries behaviour of its own."
    (tmp_path / "a.pkl").write_bytes(wholes["pickle"])
    todo, kinds = [read_file(tmp_path / "a.pkl")], set()
    while todo:
        value = todo.pop()
        kinds.add(type(value))
        todo += [*value] if isinstance(value, (list, tuple, set)) else [*value, *value.values()] if type(value) is dict else [value.state] if type(value) is Noted else []
    assert kinds <= {dict, list, tuple, set, str, int, float, bool, type(None), bytes, torch.Tensor, Noted}


def test_a_pickle_may_be_read_by_more_than_one_reader_at_once(wholes, tmp_path):
    "Nothing of a load is kept: unknown names of one file do not spoil the next."
    (tmp_path / "bad.pkl").write_bytes(pickled(call("strange.thing")))
    (tmp_path / "good.pkl").write_bytes(wholes["pickle"])
    before = dict(allowlist.CALLS), dict(allowlist.STEPS)
    for _ in range(2):
        with pytest.raises(ValueError):
            read_file(tmp_path / "bad.pkl")
        assert read_module(tmp_path / "good.pkl").tensors
    assert (allowlist.CALLS, allowlist.STEPS) == before and archives.MAX_MODULES == 10_000
