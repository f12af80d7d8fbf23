"""KServe's clients, as they come from PyPI."""

import unittest

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput
from serving import EVERY_TYPE, serving, start

X = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.float32)
DTYPES = {"BOOL": np.bool_, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64}


def tensor(name, value, datatype, binary=True):
    given = InferInput(name, list(value.shape), datatype)
    given.set_data_from_numpy(value, binary_data=binary)
    return given


def request(binary=True, **options):
    return InferRequest(model_name="mlp", infer_inputs=[tensor("x", X, "FP32", binary)], request_id="a-7", **options)


class KServe(unittest.IsolatedAsyncioTestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = start(cls, "mlp", "--engine", "tract")
        cls.url = f"http://{cls.server.http}"

    async def asyncSetUp(self):
        self.rest = InferenceRESTClient(RESTConfig(protocol="v2"))
        self.grpc = InferenceGRPCClient(self.server.grpc)
        self.addAsyncCleanup(self.rest.close)
        self.addAsyncCleanup(self.grpc.close)

    async def test_health(self):
        self.assertTrue(await self.rest.is_server_live(self.url))
        self.assertTrue(await self.rest.is_server_ready(self.url))
        self.assertTrue(await self.rest.is_model_ready(self.url, "mlp"))
        self.assertTrue(await self.grpc.is_server_live())
        self.assertTrue(await self.grpc.is_server_ready())
        self.assertTrue(await self.grpc.is_model_ready("mlp"))

    async def test_every_way_gives_the_same(self):
        answers = []
        for binary in [True, False]:
            for output in [True, False]:
                outputs = [RequestedOutput("y", {"binary_data": output})]
                answers.append(await self.rest.infer(self.url, request(binary, request_outputs=outputs), "mlp"))
            answers.append(await self.rest.infer(self.url, request(binary, parameters={"binary_data_output": True}), "mlp"))
            answers.append(await self.grpc.infer(request(binary)))
        expected = answers[0].outputs[0].as_numpy()
        self.assertEqual(expected.shape, (2, 3))
        for answer in answers:
            self.assertEqual((answer.id, answer.model_name, answer.outputs[0].name), ("a-7", "mlp", "y"))
            np.testing.assert_array_equal(answer.outputs[0].as_numpy(), expected)

    async def test_refusals(self):
        wrong = InferRequest("mlp", [tensor("x", np.zeros((1, 3), np.float32), "FP32")])
        with self.assertRaises(httpx.HTTPStatusError) as caught:
            await self.rest.infer(self.url, wrong, "mlp")
        self.assertEqual(caught.exception.response.status_code, 400)
        with self.assertRaises(grpc.RpcError) as caught:
            await self.grpc.infer(wrong)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("input `x` takes shape [-1, 4]", caught.exception.details())


class Types(unittest.IsolatedAsyncioTestCase):
    async def test_every_type(self):
        with serving("every-type", "--engine", "tract") as server:
            for binary in [True, False]:
                inputs, expected = [], {}
                for name, (datatype, values) in EVERY_TYPE.items():
                    value = np.array(values, DTYPES.get(datatype, name))
                    expected[f"{name}_out"] = value
                    # The client has no JSON for FP16.
                    inputs.append(tensor(f"{name}_in", value, datatype, binary or datatype == "FP16"))
                request = InferRequest("every-type", inputs)
                async with InferenceRESTClient(RESTConfig(protocol="v2")) as rest:
                    answers = [await rest.infer(f"http://{server.http}", request, "every-type")]
                # What comes raw over gRPC comes so for all.
                if binary:
                    async with InferenceGRPCClient(server.grpc) as remote:
                        answers.append(await remote.infer(request))
                for answer in answers:
                    given = {output.name: output.as_numpy() for output in answer.outputs}
                    for name, value in expected.items():
                        self.assertEqual(given[name].dtype, value.dtype)
                        np.testing.assert_array_equal(given[name], value, name)

    async def test_strings(self):
        texts = np.array(["grüß".encode(), b"", b"a"], np.object_)
        with serving("strings", "--engine", "onnxruntime") as server:
            for binary in [True, False]:
                request = InferRequest("strings", [tensor("text", texts, "BYTES", binary)])
                async with InferenceRESTClient(RESTConfig(protocol="v2")) as rest, InferenceGRPCClient(server.grpc) as remote:
                    over_rest = await rest.infer(f"http://{server.http}", request, "strings")
                    over_grpc = await remote.infer(request)
                for answer in [over_rest, over_grpc]:
                    given = [text if isinstance(text, bytes) else text.encode() for text in answer.outputs[0].as_numpy()]
                    self.assertEqual(given, list(texts))
