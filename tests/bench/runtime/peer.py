"""What the runtime is measured against; `cargo xtask bench runtime` runs each as a process of its own.

    python peer.py mlp MODEL SAMPLES                      writes a net of 128-256-256-10 with random weights, and inputs for it
    python peer.py alone MODEL SHAPES SECONDS             onnxruntime in this process, one thread: prints {"rps", "p50_us"}
    python peer.py triton FOLDER NAME MODEL SPECS PORT    the command that serves MODEL in Triton's binary, by its Python backend
    python peer.py mlserver FOLDER NAME MODEL PORT        a folder that `mlserver start` serves MODEL from
    python peer.py kserve NAME MODEL PORT                 serves MODEL by KServe's server, until it is killed

SHAPES is JSON, {"input": [datatype, [dimensions]]}; SPECS is {"inputs": SHAPES, "outputs": SHAPES}.
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
import time
from pathlib import Path

NUMPY = {"FP32": "float32", "INT64": "int64"}


def mlp(path: str, samples: str) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(7)
    nodes, weights, name = [], [], "x"
    sizes = [128, 256, 256, 10]
    for layer, (rows, columns) in enumerate(zip(sizes, sizes[1:])):
        weights.append(numpy_helper.from_array(random.normal(0, rows**-0.5, (rows, columns)).astype("float32"), f"w{layer}"))
        weights.append(numpy_helper.from_array(random.normal(0, 0.1, columns).astype("float32"), f"b{layer}"))
        last = layer == len(sizes) - 2
        nodes.append(helper.make_node("Gemm", [name, f"w{layer}", f"b{layer}"], ["y" if last else f"h{layer}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"h{layer}"], [f"r{layer}"]))
            name = f"r{layer}"
    value = lambda name, size: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
    graph = helper.make_graph(nodes, "mlp", [value("x", sizes[0])], [value("y", sizes[-1])], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    np.savez(samples, x=random.random((512, sizes[0])).astype("float32"))


def alone(path: str, shapes: str, seconds: str) -> None:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    feeds = {name: np.ones(shape, NUMPY[datatype]) for name, (datatype, shape) in json.loads(shapes).items()}
    took, end = [], time.perf_counter() + float(seconds)
    while time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, feeds)
        took.append(time.perf_counter() - start)
    took.sort()
    print(json.dumps({"rps": len(took) / sum(took), "p50_us": took[len(took) // 2] * 1e6}))


TRITON_MODEL = """import sys
sys.path.insert(0, {site!r})
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession({model!r}, options)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def execute(self, requests):
        responses = []
        for request in requests:
            feeds = {{name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}}
            values = self.session.run(self.outputs, feeds)
            tensors = [pb_utils.Tensor(name, value) for name, value in zip(self.outputs, values)]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses
"""


def triton(folder: str, name: str, model: str, specs: str, port: str) -> None:
    import pytriton

    site = sysconfig.get_paths()["purelib"]
    server = Path(pytriton.__file__).parent / "tritonserver"
    backend = server / "backends" / "python"
    stub = server / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    if not (backend / stub.name).exists():
        shutil.copy2(stub, backend)
    specs = json.loads(specs)
    entry = lambda name, datatype, shape: f'{{ name: "{name}" data_type: TYPE_{datatype} dims: {shape[1:]} }}'
    entries = lambda specs: ", ".join(entry(name, *spec) for name, spec in specs.items())
    repository = Path(folder)
    (repository / name / "1").mkdir(parents=True, exist_ok=True)
    (repository / name / "config.pbtxt").write_text(
        f'backend: "python"\nmax_batch_size: 32\ndynamic_batching {{}}\ninput [{entries(specs["inputs"])}]\noutput [{entries(specs["outputs"])}]\n'
        "instance_group [{ kind: KIND_CPU count: 1 }]\n"
    )
    (repository / name / "1" / "model.py").write_text(TRITON_MODEL.format(site=site, model=model))
    print(
        json.dumps(
            [
                str(server / "bin" / "tritonserver"),
                f"--model-repository={repository}",
                f"--backend-directory={server / 'backends'}",
                f"--cache-directory={server / 'caches'}",
                "--http-address=127.0.0.1",
                f"--http-port={port}",
                "--allow-grpc=false",
                "--allow-metrics=false",
            ]
        )
    )


MLSERVER_MODEL = """import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Onnx(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        return True

    async def predict(self, payload):
        feeds = {value.name: NumpyCodec.decode_input(value) for value in payload.inputs}
        names = [value.name for value in self.session.get_outputs()]
        values = self.session.run(names, feeds)
        outputs = [NumpyCodec.encode_output(name, value) for name, value in zip(names, values)]
        return InferenceResponse(model_name=self.name, outputs=outputs)
"""


def mlserver(folder: str, name: str, model: str, port: str) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"host": "127.0.0.1", "http_port": int(port), "grpc_port": int(port) + 1, "metrics_port": int(port) + 2}
    settings |= {"parallel_workers": 0, "debug": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    settings = {"name": name, "implementation": "onnx_model.Onnx", "parameters": {"uri": model}}
    (folder / "model-settings.json").write_text(json.dumps(settings))
    (folder / "onnx_model.py").write_text(MLSERVER_MODEL)


def kserve(name: str, path: str, port: str) -> None:
    import onnxruntime
    import uvicorn
    from kserve import InferOutput, InferResponse, Model, ModelServer

    class Onnx(Model):
        def __init__(self):
            super().__init__(name)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            self.session = onnxruntime.InferenceSession(path, options)
            self.outputs = self.session.get_outputs()
            self.ready = True

        def predict(self, payload, headers=None, response_headers=None):
            feeds = {value.name: value.as_numpy() for value in payload.inputs}
            outputs = []
            for output, value in zip(self.outputs, self.session.run(None, feeds)):
                outputs.append(InferOutput(output.name, list(value.shape), "FP32"))
                outputs[-1].set_data_from_numpy(value, binary_data=False)
            return InferResponse(response_id=payload.id or "-", model_name=self.name, infer_outputs=outputs)

    # It listens on every address, and has no flag for that.
    configuration = uvicorn.Config
    uvicorn.Config = lambda app, **options: configuration(app, **options | {"host": "127.0.0.1"})
    ModelServer(http_port=int(port), enable_grpc=False, enable_latency_logging=False, workers=1).start([Onnx()])


if __name__ == "__main__":
    tasks = {"mlp": mlp, "alone": alone, "triton": triton, "mlserver": mlserver, "kserve": kserve}
    tasks[sys.argv[1]](*sys.argv[2:])
