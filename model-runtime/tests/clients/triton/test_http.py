"""`tritonclient.http`, as it comes from PyPI."""

import asyncio
import unittest

import numpy as np
import tritonclient.http as client
import tritonclient.http.aio as aio
from serving import EVERY_TYPE, serving, start
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

X = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.float32)


def tensor(name, value, datatype=None, **options):
    given = client.InferInput(name, list(value.shape), datatype or np_to_triton_dtype(value.dtype))
    given.set_data_from_numpy(value, **options)
    return given


def rows(result):
    return result.as_numpy("y").shape[0]


class Http(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = start(cls, "mlp", "--engine", "tract", "--max-batch", "8")
        cls.client = client.InferenceServerClient(cls.server.http, concurrency=4)
        cls.addClassCleanup(cls.client.close)

    def infer(self, **options):
        return self.client.infer("mlp", [tensor("x", X)], **options)

    def refused(self, call, text):
        with self.assertRaises(InferenceServerException) as caught:
            call()
        self.assertIn(text, caught.exception.message())
        return caught.exception

    def test_health(self):
        self.assertTrue(self.client.is_server_live())
        self.assertTrue(self.client.is_server_ready())
        self.assertTrue(self.client.is_model_ready("mlp"))
        self.assertTrue(self.client.is_model_ready("mlp", "1"))
        self.assertFalse(self.client.is_model_ready("other"))
        self.assertFalse(self.client.is_model_ready("mlp", "2"))

    def test_metadata(self):
        server = self.client.get_server_metadata()
        self.assertEqual(server["name"], "plimsoll-runtime")
        self.assertIn("binary_tensor_data", server["extensions"])
        model = self.client.get_model_metadata("mlp")
        self.assertEqual(model["inputs"], [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}])
        self.assertEqual(model["outputs"], [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}])

    def test_configuration_and_index(self):
        configuration = self.client.get_model_config("mlp")
        self.assertEqual((configuration["max_batch_size"], configuration["input"][0]["dims"]), (8, [4]))
        [entry] = self.client.get_model_repository_index()
        self.assertEqual((entry["name"], entry["version"], entry["state"]), ("mlp", "1", "READY"))

    def test_statistics(self):
        def count():
            [model] = self.client.get_inference_statistics("mlp")["model_stats"]
            return model["inference_stats"]["success"]["count"]

        before = count()
        self.infer()
        self.assertEqual(count(), before + 1)
        self.assertEqual(self.client.get_inference_statistics()["model_stats"][0]["name"], "mlp")

    def test_binary_and_json_are_the_same(self):
        answers = []
        for sent in [True, False]:
            for asked in [True, False]:
                inputs = [tensor("x", X, binary_data=sent)]
                outputs = [client.InferRequestedOutput("y", binary_data=asked)]
                result = self.client.infer("mlp", inputs, outputs=outputs)
                self.assertEqual("data" in result.get_output("y"), not asked)
                answers.append(result.as_numpy("y"))
        answers.append(self.infer().as_numpy("y"))
        for answer in answers:
            self.assertEqual((answer.dtype, answer.shape), (np.float32, (2, 3)))
            np.testing.assert_array_equal(answer, answers[0])
        np.testing.assert_allclose(answers[0].sum(axis=1), 1, rtol=1e-6)

    def test_compression(self):
        many = np.tile(X, (200, 1))
        plain = self.client.infer("mlp", [tensor("x", many)]).as_numpy("y")
        for request in ["gzip", "deflate", None]:
            for response in ["gzip", "deflate", None]:
                result = self.client.infer(
                    "mlp",
                    [tensor("x", many)],
                    request_compression_algorithm=request,
                    response_compression_algorithm=response,
                )
                np.testing.assert_array_equal(result.as_numpy("y"), plain)

    def test_options(self):
        result = self.infer(request_id="a-7", model_version="1", priority=1, timeout=5_000_000, parameters={"colour": "red"})
        self.assertEqual(result.get_response()["id"], "a-7")
        self.refused(lambda: self.infer(sequence_id=9, sequence_start=True), "the extension for sequences is not supported")

    def test_classification(self):
        result = self.infer(outputs=[client.InferRequestedOutput("y", class_count=2)])
        classes = result.as_numpy("y")
        self.assertEqual(classes.shape, (2, 2))
        values = self.infer().as_numpy("y")
        for row, best in zip(values, classes[:, 0]):
            value, index = best.decode().split(":")
            self.assertEqual(int(index), int(np.argmax(row)))
            self.assertAlmostEqual(float(value), float(row.max()), places=6)

    def test_asynchronous(self):
        waiting = [self.client.async_infer("mlp", [tensor("x", X)], request_id=str(number)) for number in range(16)]
        results = [request.get_result() for request in waiting]
        self.assertEqual([result.get_response()["id"] for result in results], [str(number) for number in range(16)])

    def test_asyncio(self):
        async def run():
            async with aio.InferenceServerClient(self.server.http) as other:
                self.assertTrue(await other.is_model_ready("mlp"))
                results = await asyncio.gather(*(other.infer("mlp", [tensor("x", X)]) for _ in range(16)))
                metadata = await other.get_model_metadata("mlp")
                return [rows(result) for result in results], metadata["name"]

        self.assertEqual(asyncio.run(run()), ([2] * 16, "mlp"))

    def test_refusals(self):
        wrong = np.zeros((1, 3), np.float32)
        error = self.refused(lambda: self.client.infer("mlp", [tensor("x", wrong)]), "input `x` takes shape [-1, 4]")
        self.assertEqual(error.status(), "400")
        error = self.refused(lambda: self.client.infer("other", [tensor("x", X)]), "there is no model `other`")
        self.assertEqual(error.status(), "404")
        self.refused(lambda: self.client.infer("mlp", [tensor("z", X)]), "input `x` (FP32, shape [-1, 4]) is missing")
        self.refused(
            lambda: self.client.infer("mlp", [tensor("x", X)], outputs=[client.InferRequestedOutput("z")]),
            "output `z` is not the model's; it gives y",
        )
        shared = client.InferInput("x", [2, 4], "FP32")
        shared.set_shared_memory("region", X.nbytes)
        self.refused(lambda: self.client.infer("mlp", [shared]), "the extension for shared memory is not supported")
        with self.assertRaises(InferenceServerException):
            self.client.load_model("mlp")

    def test_requests_of_other_tools(self):
        body, length = client.InferenceServerClient.generate_request_body([tensor("x", X)])
        import urllib.request

        request = urllib.request.Request(f"http://{self.server.http}/v2/models/mlp/infer", data=body)
        request.add_header("Inference-Header-Content-Length", str(length))
        with urllib.request.urlopen(request) as answer:
            content = answer.read()
            length = answer.headers["Inference-Header-Content-Length"]
        result = client.InferenceServerClient.parse_response_body(content, header_length=length and int(length))
        np.testing.assert_array_equal(result.as_numpy("y"), self.infer().as_numpy("y"))


class Types(unittest.TestCase):
    def test_every_type(self):
        with serving("every-type", "--engine", "tract") as server, client.InferenceServerClient(server.http) as http:
            for binary in [True, False]:
                inputs, expected = [], {}
                for name, (datatype, values) in EVERY_TYPE.items():
                    expected[name] = np.array(values, triton_to_np_dtype(datatype))
                    # The client has no JSON for FP16.
                    inputs.append(tensor(f"{name}_in", expected[name], binary_data=binary or datatype == "FP16"))
                outputs = [client.InferRequestedOutput(f"{name}_out", binary_data=binary) for name in EVERY_TYPE]
                result = http.infer("every-type", inputs, outputs=outputs)
                for name, value in expected.items():
                    given = result.as_numpy(f"{name}_out")
                    self.assertEqual(given.dtype, value.dtype)
                    np.testing.assert_array_equal(given, value, name)

    def test_strings(self):
        with serving("strings", "--engine", "onnxruntime") as server, client.InferenceServerClient(server.http) as http:
            texts = np.array(["grüß".encode(), b"", b"a" * 1000], np.object_)
            for sent in [True, False]:
                for asked in [True, False]:
                    outputs = [client.InferRequestedOutput("same", binary_data=asked)]
                    given = tensor("text", texts, binary_data=sent)
                    result = http.infer("strings", [given], outputs=outputs).as_numpy("same")
                    as_bytes = [text if isinstance(text, bytes) else text.encode() for text in result]
                    self.assertEqual(as_bytes, list(texts))

    def test_bfloat16(self):
        with serving("bfloat16", "--engine", "onnxruntime") as server, client.InferenceServerClient(server.http) as http:
            values = np.array([1.5, -2.0], triton_to_np_dtype("BF16"))
            result = http.infer("bfloat16", [tensor("x", values, "BF16")]).as_numpy("y")
            self.assertEqual([float(value) for value in result], [1.5, -2.0])
