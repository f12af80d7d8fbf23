"""MLServer's types, codecs, stubs and command line, as they come from PyPI."""

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest
import urllib.error
import urllib.request

import grpc
import numpy as np
from mlserver import types
from mlserver.codecs import NumpyCodec, NumpyRequestCodec, StringCodec
from mlserver.grpc import converters, dataplane_pb2, dataplane_pb2_grpc
from serving import serving, start

X = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.float32)


def post(server, model, request):
    data = request.model_dump_json(exclude_none=True).encode()
    call = urllib.request.Request(f"http://{server.http}/v2/models/{model}/infer", data=data)
    with urllib.request.urlopen(call) as answer:
        return types.InferenceResponse.model_validate_json(answer.read())


def request(**options):
    return types.InferenceRequest(inputs=[NumpyCodec.encode_input("x", X)], **options)


class MLServer(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = start(cls, "mlp", "--engine", "tract")
        cls.channel = grpc.insecure_channel(cls.server.grpc)
        cls.addClassCleanup(cls.channel.close)
        cls.stub = dataplane_pb2_grpc.GRPCInferenceServiceStub(cls.channel)

    def test_metadata(self):
        with urllib.request.urlopen(f"http://{self.server.http}/v2") as answer:
            over_http = types.MetadataServerResponse.model_validate_json(answer.read())
        over_grpc = converters.ServerMetadataResponseConverter.to_types(self.stub.ServerMetadata(dataplane_pb2.ServerMetadataRequest()))
        self.assertEqual(over_http, over_grpc)
        with urllib.request.urlopen(f"http://{self.server.http}/v2/models/mlp") as answer:
            over_http = types.MetadataModelResponse.model_validate_json(answer.read())
        asked = dataplane_pb2.ModelMetadataRequest(name="mlp")
        over_grpc = converters.ModelMetadataResponseConverter.to_types(self.stub.ModelMetadata(asked))
        self.assertEqual((over_http.inputs[0].shape, over_http.outputs[0].name), ([-1, 4], "y"))
        self.assertEqual((over_grpc.inputs[0].shape, over_grpc.platform), ([-1, 4], over_http.platform))
        self.assertTrue(self.stub.ModelReady(dataplane_pb2.ModelReadyRequest(name="mlp")).ready)

    def test_every_way_gives_the_same(self):
        over_http = post(self.server, "mlp", request(id="a-7"))
        expected = NumpyRequestCodec.decode_response(over_http)
        self.assertEqual((over_http.id, expected.shape, expected.dtype), ("a-7", (2, 3), np.float32))
        for raw in [True, False]:
            message = converters.ModelInferRequestConverter.from_types(
                request(id="a-7"), model_name="mlp", model_version=None, use_raw=raw
            )
            answer = self.stub.ModelInfer(message)
            self.assertEqual(bool(answer.raw_output_contents), raw)
            answer = converters.ModelInferResponseConverter.to_types(answer)
            self.assertEqual(answer.id, "a-7")
            np.testing.assert_array_equal(NumpyRequestCodec.decode_response(answer), expected)

    def test_refusals(self):
        wrong = types.InferenceRequest(inputs=[NumpyCodec.encode_input("x", X[:, :3])])
        with self.assertRaises(urllib.error.HTTPError) as caught:
            post(self.server, "mlp", wrong)
        with caught.exception as error:
            self.assertIn("input `x` takes shape [-1, 4]", json.load(error)["error"])
        message = converters.ModelInferRequestConverter.from_types(wrong, model_name="mlp", model_version=None)
        with self.assertRaises(grpc.RpcError) as caught:
            self.stub.ModelInfer(message)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)

    def test_the_command_line_sends_a_file(self):
        for options in [[], ["--binary-data"]]:
            with tempfile.TemporaryDirectory() as folder:
                given, answered = pathlib.Path(folder) / "given.jsonl", pathlib.Path(folder) / "answered.jsonl"
                given.write_text("".join(request(id=str(n)).model_dump_json(exclude_none=True) + "\n" for n in range(20)))
                program = str(pathlib.Path(sys.executable).parent / "mlserver")
                command = [program, "infer", "--url", self.server.http, "--model-name", "mlp", *options]
                command += ["--input-data-path", str(given), "--output-data-path", str(answered), "--workers", "4"]
                subprocess.run(command, check=True, capture_output=True)
                answers = [types.InferenceResponse.model_validate_json(line) for line in answered.read_text().splitlines()]
            self.assertEqual(sorted(answer.id for answer in answers), sorted(str(number) for number in range(20)))
            expected = NumpyRequestCodec.decode_response(post(self.server, "mlp", request()))
            for answer in answers:
                np.testing.assert_allclose(NumpyRequestCodec.decode_response(answer), expected, rtol=1e-6)


class Types(unittest.TestCase):
    def test_strings(self):
        texts = ["grüß", "", "a"]
        with serving("strings", "--engine", "onnxruntime") as server:
            given = types.RequestInput(name="text", datatype="BYTES", shape=[3], data=texts)
            answer = post(server, "strings", types.InferenceRequest(inputs=[given]))
            self.assertEqual(StringCodec.decode_output(answer.outputs[0]), texts)
            given = types.RequestInput(name="text", datatype="BYTES", shape=[3], data=[text.encode() for text in texts])
            message = converters.ModelInferRequestConverter.from_types(
                types.InferenceRequest(inputs=[given]), model_name="strings", model_version=None
            )
            with grpc.insecure_channel(server.grpc) as channel:
                answer = dataplane_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message)
            answer = converters.ModelInferResponseConverter.to_types(answer)
            self.assertEqual(StringCodec.decode_output(answer.outputs[0]), texts)
