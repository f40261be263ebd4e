import contextlib
import io
import os
import pickle
import pickletools
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.data.pickles import PICKLE_ERRORS, load_plain_pickle

# as Python 2 writes it with protocols 0 and 2: {'raw': 'caf\xc3\xa9', u'sent': u'caf\xe9', 'ann_id': 2**64, 'area': 1.5}
PYTHON_2 = [
    b"(dp0\nS'raw'\np1\nS'caf\\xc3\\xa9'\np2\nsVsent\np3\nVcaf\xe9\np4\nsS'ann_id'\np5\nL18446744073709551616L\nsS'area'\np6\nF1.5\ns.",
    b"\x80\x02}q\x00(U\x03rawq\x01U\x05caf\xc3\xa9q\x02X\x04\x00\x00\x00sentq\x03X\x05\x00\x00\x00caf\xc3\xa9q\x04"
    b"U\x06ann_idq\x05\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01U\x04areaq\x06G?\xf8\x00\x00\x00\x00\x00\x00u.",
]


@pytest.mark.parametrize("raw", PYTHON_2)
def test_pickles_of_python_2(raw):
    assert load_plain_pickle(io.BytesIO(raw)) == {"raw": "café", "sent": "café", "ann_id": 2**64, "area": 1.5}


def test_every_plain_type_passes():
    plain = {"a": [1, 2.5, None, True, "é", b"x"[0]], ("t", 1): {3, 4}, "f": frozenset({1}), "big": 2**80}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert load_plain_pickle(io.BytesIO(pickle.dumps(plain, protocol=protocol))) == plain


class Calls:
    """Pickles to a call of ``function`` with ``arguments`` when it is read back."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def gadgets(mark: str) -> dict[str, bytes]:
    """Files that make a folder ``mark`` when a careless reader opens them."""
    command = f"mkdir {mark}"
    code = f"import os; os.mkdir({mark!r})"
    return {
        "os.system": pickle.dumps(Calls(os.system, command)),
        "os.mkdir": pickle.dumps(Calls(os.mkdir, mark)),
        "subprocess.Popen": pickle.dumps(Calls(subprocess.Popen, ["mkdir", mark])),
        "eval": pickle.dumps([1, {"x": Calls(eval, f"__import__('os').mkdir({mark!r})")}]),
        "exec": pickle.dumps(Calls(exec, code), protocol=0),
        "getattr": b"cbuiltins\ngetattr\n(cos\nmkdir\nS'__call__'\ntR.",
        "python 2's eval": f"c__builtin__\neval\n(S\"__import__('os').mkdir('{mark}')\"\ntR.".encode(),
        "python 2's execfile": f"c__builtin__\nexecfile\n(S'{mark}'\ntR.".encode(),
        "posix.system": f"cposix\nsystem\n(S'{command}'\ntR.".encode(),
        "nt.system": f"cnt\nsystem\n(S'{command}'\ntR.".encode(),
        "INST": f"(S'{command}'\nios\nsystem\n.".encode(),
        "OBJ": f"(cos\nsystem\nS'{command}'\no.".encode(),
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n]" + b"X\x05\x00\x00\x00mkdira\x85\x81.",
        "dotted name": b"\x80\x04\x8c\x08builtins\x8c\x10dict.__class__.x\x93.",
        "dotted way out of a module": b"\x80\x04\x8c\x0bcollections\x8c\x0f_sys.modules.os\x93.",
        "importlib": b"cimportlib\nimport_module\n(S'os'\ntR.",
        "operator.methodcaller": b"coperator\nmethodcaller\n(S'system'\nS'x'\ntR.",
        "functools.partial": b"cfunctools\npartial\n(cos\nsystem\ntR.",
        "runpy": f"crunpy\n_run_code\n(S'{command}'\n}}tR.".encode(),
        "pickle in a pickle": b"cpickle\nloads\n(S'x'\ntR.",
        "copyreg": b"ccopyreg\n_reconstructor\n(cos\n_wrap_close\ncbuiltins\nobject\nNtR.",
        "numpy": pickle.dumps(np.zeros(2)),
        "torch": pickle.dumps(torch.zeros(2)),
        "a function alone": pickle.dumps(print),
        "a persistent id": b"Pmodule\n.",
        "type": b"cbuiltins\ntype\n(S'X'\n)}tR.",
        "the same name elsewhere": b"c__main__\nlist\n.",
    }


NAMES = tuple(gadgets("x"))


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_that_would_run_code_is_refused(name, tmp_path):
    mark = tmp_path / "was-here"
    raw = gadgets(str(mark))[name]
    with pytest.raises(pickle.UnpicklingError, match=r"only plain containers|persistent"):
        load_plain_pickle(io.BytesIO(raw))
    assert not mark.exists()


def test_the_gadgets_are_real(tmp_path):
    """The careless reader does run them: otherwise the test above would prove nothing."""
    for number, name in enumerate(("os.mkdir", "exec", "python 2's eval", "INST", "posix.system")):
        mark = tmp_path / str(number)
        pickle.load(io.BytesIO(gadgets(str(mark))[name]))
        assert mark.exists(), name


def test_state_cannot_reach_a_class():
    """BUILD on a class would set its attributes, for everybody."""
    for raw in (b"cbuiltins\ndict\n}S'get'\nI1\nsb.", b"ccollections\nOrderedDict\nN}S'get'\nI1\ns\x86b."):
        with pytest.raises(PICKLE_ERRORS):
            load_plain_pickle(io.BytesIO(raw))
    assert callable(dict.get)


@given(st.data())
def test_a_spoilt_file_raises_one_of_the_errors_or_is_read(data):
    whole = bytearray(pickle.dumps([{"ref_id": 1, "sentences": [{"raw": "the dog", "sent_id": 2}]}] * 2, protocol=2))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    sizes = [0]
    with contextlib.suppress(*PICKLE_ERRORS):
        sizes += [argument for _, argument, _ in pickletools.genops(bytes(whole)) if isinstance(argument, int)]
    if max(sizes) < 1 << 20:  # a memo of that length would really be made
        with contextlib.suppress(*PICKLE_ERRORS):
            load_plain_pickle(io.BytesIO(bytes(whole)))


@given(st.integers(0, 200))
def test_a_cut_file_raises_one_of_the_errors(length):
    whole = pickle.dumps([{"ref_id": number, "sentences": [{"raw": "the dog"}]} for number in range(9)], protocol=2)
    with pytest.raises(PICKLE_ERRORS):
        load_plain_pickle(io.BytesIO(whole[: min(length, len(whole) - 1)]))
