"""The server under test: the real binary on ports of its own, serving one of the models of `tests/models`."""

import contextlib
import json
import os
import pathlib
import subprocess
import threading

MODELS = pathlib.Path(__file__).parent.parent / "models"


class Server:
    """A running server; `http` and `grpc` are its addresses, HOST:PORT."""

    def __init__(self, model, *arguments):
        command = [os.environ["PLIMSOLL_RUNTIME"], "serve", str(MODELS / f"{model}.onnx"), "--threads", "1"]
        command += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        seen = []
        for line in self.process.stderr:
            seen.append(line)
            record = json.loads(line)
            if record["message"] == "listening":
                self.http, self.grpc = record["http"], record["grpc"]
            if record["message"] == "ready":
                break
        else:
            raise RuntimeError("the server did not start: " + "".join(seen))
        # Nobody else reads what it logs, and a full pipe would stop it.
        threading.Thread(target=lambda: self.process.stderr.read(), daemon=True).start()

    def stop(self):
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serving(model, *arguments):
    """A server of `model` for a `with` block."""
    server = Server(model, *arguments)
    try:
        yield server
    finally:
        server.stop()


def start(case, model, *arguments):
    """A server of `model` for all tests of the class `case`."""
    server = Server(model, *arguments)
    case.addClassCleanup(server.stop)
    return server


# A tensor of each type that `every-type.onnx` gives back, by the suffix of its names.
EVERY_TYPE = {
    "bool": ("BOOL", [False, True, True]),
    "uint8": ("UINT8", [0, 1, 255]),
    "uint16": ("UINT16", [0, 1, 65535]),
    "uint32": ("UINT32", [0, 1, 2**32 - 1]),
    "uint64": ("UINT64", [0, 1, 2**64 - 1]),
    "int8": ("INT8", [-128, 0, 127]),
    "int16": ("INT16", [-(2**15), 0, 2**15 - 1]),
    "int32": ("INT32", [-(2**31), 0, 2**31 - 1]),
    "int64": ("INT64", [-(2**63), 0, 2**63 - 1]),
    "fp16": ("FP16", [-1.5, 0, 65504]),
    "fp32": ("FP32", [-1.5, 0, 0.1]),
    "fp64": ("FP64", [-1.5, 0, 1e300]),
}
