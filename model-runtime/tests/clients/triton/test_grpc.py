"""`tritonclient.grpc`, health and reflection, as they come from PyPI."""

import asyncio
import queue
import unittest

import grpc
import numpy as np
import tritonclient.grpc as client
import tritonclient.grpc.aio as aio
import tritonclient.http
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from serving import EVERY_TYPE, serving, start
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

X = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.float32)


def tensor(name, value, datatype=None):
    given = client.InferInput(name, list(value.shape), datatype or np_to_triton_dtype(value.dtype))
    given.set_data_from_numpy(value)
    return given


class Grpc(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = start(cls, "mlp", "--engine", "tract", "--max-batch", "8")
        cls.client = client.InferenceServerClient(cls.server.grpc)
        cls.addClassCleanup(cls.client.close)

    def infer(self, **options):
        return self.client.infer("mlp", [tensor("x", X)], **options)

    def refused(self, call, code, text):
        with self.assertRaises(InferenceServerException) as caught:
            call()
        self.assertEqual(caught.exception.status(), f"StatusCode.{code}")
        self.assertIn(text, caught.exception.message())

    def test_health(self):
        self.assertTrue(self.client.is_server_live())
        self.assertTrue(self.client.is_server_ready())
        self.assertTrue(self.client.is_model_ready("mlp"))
        self.assertFalse(self.client.is_model_ready("other"))
        with grpc.insecure_channel(self.server.grpc) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ["", "inference.GRPCInferenceService"]:
                standing = health.Check(health_pb2.HealthCheckRequest(service=name)).status
                self.assertEqual(standing, health_pb2.HealthCheckResponse.SERVING)

    def test_metadata(self):
        server = self.client.get_server_metadata()
        self.assertEqual(server.name, "plimsoll-runtime")
        self.assertIn("statistics", server.extensions)
        model = self.client.get_model_metadata("mlp", as_json=True)
        self.assertEqual(model["inputs"], [{"name": "x", "datatype": "FP32", "shape": ["-1", "4"]}])
        self.refused(lambda: self.client.get_model_metadata("other"), "NOT_FOUND", "there is no model `other`")

    def test_what_is_told_is_the_same_as_over_http(self):
        with tritonclient.http.InferenceServerClient(self.server.http) as http:
            metadata, over_grpc = http.get_model_metadata("mlp"), self.client.get_model_metadata("mlp")
            self.assertEqual((over_grpc.platform, list(over_grpc.versions)), (metadata["platform"], metadata["versions"]))
            self.assertEqual(list(self.client.get_server_metadata().extensions), http.get_server_metadata()["extensions"])
            configuration = self.client.get_model_config("mlp", as_json=True)["config"]
            expected = http.get_model_config("mlp")
            # What is 0 or empty is left out of messages, and JSON has no 64-bit integers.
            expected["dynamic_batching"] = {}
            for tensors in [expected["input"], expected["output"]]:
                tensors[0]["dims"] = [str(size) for size in tensors[0]["dims"]]
            self.assertEqual(configuration, expected)
            [index] = self.client.get_model_repository_index(as_json=True)["models"]
            [expected] = http.get_model_repository_index()
            self.assertEqual(index, {key: value for key, value in expected.items() if value})

    def test_statistics(self):
        def count():
            [model] = self.client.get_inference_statistics("mlp").model_stats
            return model.inference_stats.success.count

        before = count()
        self.infer()
        self.assertEqual(count(), before + 1)

    def test_inference_is_the_same_as_over_http(self):
        result = self.infer(request_id="a-7", model_version="1", priority=1, timeout=5_000_000, parameters={"colour": "red"})
        self.assertEqual(result.get_response().id, "a-7")
        over_http = tritonclient.http.InferInput("x", list(X.shape), "FP32")
        over_http.set_data_from_numpy(X)
        with tritonclient.http.InferenceServerClient(self.server.http) as http:
            expected = http.infer("mlp", [over_http]).as_numpy("y")
        np.testing.assert_array_equal(result.as_numpy("y"), expected)

    def test_compression(self):
        many = np.tile(X, (200, 1))
        plain = self.client.infer("mlp", [tensor("x", many)]).as_numpy("y")
        for algorithm in ["gzip", "deflate"]:
            result = self.client.infer("mlp", [tensor("x", many)], compression_algorithm=algorithm)
            np.testing.assert_array_equal(result.as_numpy("y"), plain)

    def test_classification(self):
        classes = self.infer(outputs=[client.InferRequestedOutput("y", class_count=1)]).as_numpy("y")
        best = [int(text.decode().split(":")[1]) for text in classes[:, 0]]
        self.assertEqual(best, list(np.argmax(self.infer().as_numpy("y"), axis=1)))

    def test_asynchronous(self):
        results = queue.Queue()
        for number in range(16):
            self.client.async_infer(
                "mlp", [tensor("x", X)], lambda result, error: results.put((result, error)), request_id=str(number)
            )
        identifiers = set()
        for _ in range(16):
            result, error = results.get(timeout=60)
            self.assertIsNone(error)
            identifiers.add(result.get_response().id)
        self.assertEqual(identifiers, {str(number) for number in range(16)})

    def test_stream(self):
        results = queue.Queue()
        self.client.start_stream(lambda result, error: results.put((result, error)))
        for number in range(20):
            self.client.async_stream_infer("mlp", [tensor("x", X)], request_id=str(number))
        self.client.async_stream_infer("mlp", [tensor("x", X[:, :3])])
        self.client.async_stream_infer("mlp", [tensor("x", X)], request_id="last")
        self.client.stop_stream()
        answers = [results.get(timeout=60) for _ in range(22)]
        self.assertEqual([result.get_response().id for result, _ in answers[:20]], [str(number) for number in range(20)])
        self.assertIn("input `x` takes shape [-1, 4]", answers[20][1].message())
        self.assertEqual(answers[21][0].get_response().id, "last")

    def test_asyncio(self):
        async def run():
            async with aio.InferenceServerClient(self.server.grpc) as other:
                self.assertTrue(await other.is_server_ready())
                results = await asyncio.gather(*(other.infer("mlp", [tensor("x", X)]) for _ in range(16)))

                async def requests():
                    for number in range(5):
                        yield {"model_name": "mlp", "inputs": [tensor("x", X)], "request_id": str(number)}

                streamed = [(result, error) async for result, error in other.stream_infer(requests())]
                return len(results), [result.get_response().id for result, _ in streamed]

        self.assertEqual(asyncio.run(run()), (16, ["0", "1", "2", "3", "4"]))

    def test_refusals(self):
        wrong = tensor("x", np.zeros((1, 3), np.float32))
        self.refused(lambda: self.client.infer("mlp", [wrong]), "INVALID_ARGUMENT", "input `x` takes shape [-1, 4]")
        self.refused(lambda: self.client.infer("other", [tensor("x", X)]), "NOT_FOUND", "there is no model `other`")
        self.refused(lambda: self.infer(sequence_id=9, sequence_start=True), "INVALID_ARGUMENT", "the extension for sequences")
        shared = client.InferInput("x", [2, 4], "FP32")
        shared.set_shared_memory("region", X.nbytes)
        self.refused(lambda: self.client.infer("mlp", [shared]), "INVALID_ARGUMENT", "the extension for shared memory")
        self.refused(lambda: self.client.load_model("mlp"), "UNIMPLEMENTED", "this server has no such method")

    def test_the_protocol_is_the_published_one(self):
        """Every message, field and method that reflection tells of is in the client's own copy of the protocol."""
        with grpc.insecure_channel(self.server.grpc) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            self.assertIn("inference.GRPCInferenceService", database.get_services())
            file = database.FindFileContainingSymbol("inference.GRPCInferenceService")
        published = {}
        for module in [service_pb2, model_config_pb2]:
            theirs = descriptor_pb2.FileDescriptorProto()
            module.DESCRIPTOR.CopyToProto(theirs)
            published |= dict(parts(theirs))
        ours = dict(parts(file))
        self.assertGreater(len(ours), 150)
        for name, shape in ours.items():
            self.assertEqual(published.get(name), shape, name)


def parts(file):
    """The names of a file with what is written on the wire for each."""

    def message(prefix, descriptor):
        prefix = f"{prefix}.{descriptor.name}"
        for field in descriptor.field:
            yield f"{prefix}.{field.name}", (field.number, field.type, field.label, field.type_name)
        for kind in descriptor.enum_type:
            yield from enum(prefix, kind)
        for nested in descriptor.nested_type:
            yield from message(prefix, nested)

    def enum(prefix, descriptor):
        for value in descriptor.value:
            yield f"{prefix}.{descriptor.name}.{value.name}", value.number

    for descriptor in file.message_type:
        yield from message("", descriptor)
    for descriptor in file.enum_type:
        yield from enum("", descriptor)
    for service in file.service:
        for method in service.method:
            kinds = (method.input_type, method.output_type, method.client_streaming, method.server_streaming)
            yield f"{service.name}.{method.name}", kinds


class Types(unittest.TestCase):
    def test_every_type(self):
        with serving("every-type", "--engine", "tract") as server, client.InferenceServerClient(server.grpc) as remote:
            expected = {name: np.array(values, triton_to_np_dtype(kind)) for name, (kind, values) in EVERY_TYPE.items()}
            result = remote.infer("every-type", [tensor(f"{name}_in", value) for name, value in expected.items()])
            for name, value in expected.items():
                given = result.as_numpy(f"{name}_out")
                self.assertEqual(given.dtype, value.dtype)
                np.testing.assert_array_equal(given, value, name)

    def test_strings(self):
        with serving("strings", "--engine", "onnxruntime") as server, client.InferenceServerClient(server.grpc) as remote:
            texts = np.array(["grüß".encode(), b"", b"a" * 1000], np.object_)
            result = remote.infer("strings", [tensor("text", texts)]).as_numpy("same")
            self.assertEqual(list(result), list(texts))

    def test_bfloat16(self):
        with serving("bfloat16", "--engine", "onnxruntime") as server, client.InferenceServerClient(server.grpc) as remote:
            values = np.array([1.5, -2.0], triton_to_np_dtype("BF16"))
            result = remote.infer("bfloat16", [tensor("x", values, "BF16")]).as_numpy("y")
            self.assertEqual([float(value) for value in result], [1.5, -2.0])


class Slow(unittest.TestCase):
    def test_deadline_and_cancellation(self):
        with serving("slow") as server, client.InferenceServerClient(server.grpc) as remote:
            value = tensor("x", np.ones((1, 1), np.float32))
            with self.assertRaises(InferenceServerException) as caught:
                remote.infer("slow", [value], client_timeout=0.02)
            self.assertEqual(caught.exception.status(), "StatusCode.DEADLINE_EXCEEDED")
            with self.assertRaises(InferenceServerException) as caught:
                remote.infer("slow", [value], timeout=20_000)
            self.assertEqual(caught.exception.message(), "there was no answer within 0.02 s")
            results = queue.Queue()
            call = remote.async_infer("slow", [value], lambda result, error: results.put(error))
            call.cancel()
            self.assertEqual(results.get(timeout=60).status(), "StatusCode.CANCELLED")
            self.assertEqual(remote.infer("slow", [value]).as_numpy("y").shape, (1, 1))
