"""Traces as a collector takes them: OTLP over HTTP, decoded by the messages that OpenTelemetry publishes."""

import http.server
import json
import os
import queue
import signal
import threading
import time
import unittest
import urllib.error
import urllib.request
from unittest import mock

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from serving import serving

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{CALLER}-01", f"00-{TRACE}-{CALLER}-00"
STAGES = ["receive", "parse", "queue", "compute", "serialize"]
REQUEST = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
PATIENCE = 20


class Collector:
    """What a collector is on the wire; `answer` is called for each request, and gives its status and its message."""

    def __init__(self, answer=lambda: (200, ExportTraceServiceResponse())):
        self.requests = queue.Queue()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                status, message = answer()
                if status == 200:
                    collector.requests.put((self.path, dict(self.headers), ExportTraceServiceRequest.FromString(body)))
                self.send_response(status)
                content = message.SerializeToString()
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *arguments):
                """A server that stops waits for no answer."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def spans(self, count):
        """The next `count` spans, each with its resource's attributes."""
        spans = []
        while len(spans) < count:
            _, _, request = self.requests.get(timeout=PATIENCE)
            for of_resource in request.resource_spans:
                resource = attributes(of_resource.resource)
                spans += [(span, resource) for scope in of_resource.scope_spans for span in scope.spans]
        return spans


def attributes(holder):
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in holder.attributes}


def infer(server, parent=None, body=REQUEST):
    headers = {"traceparent": parent, "tracestate": "vendor=1"} if parent else {}
    request = urllib.request.Request(f"http://{server.http}/v2/models/mlp/infer", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


def counts(server):
    """The counter of spans, by what came of them."""
    with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    prefix = 'plimsoll_runtime_spans_total{result="'
    found = [line.removeprefix(prefix).split('"} ') for line in lines if line.startswith(prefix)]
    return {result: int(count) for result, count in found}


def tracing(collector, *arguments):
    return serving("mlp", "--engine", "tract", "--otlp-endpoint", collector.url, *arguments)


class Traces(unittest.TestCase):
    def test_a_trace_is_continued(self):
        environment = {
            "OTEL_SERVICE_NAME": "digits",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            "OTEL_EXPORTER_OTLP_HEADERS": "api-key=secret",
        }
        with Collector() as collector, mock.patch.dict(os.environ, environment), tracing(collector) as server:
            infer(server, SAMPLED)
            path, headers, request = collector.requests.get(timeout=PATIENCE)
            self.assertEqual((path, headers["content-type"], headers["api-key"]), ("/v1/traces", "application/x-protobuf", "secret"))
            collector.requests.put((path, headers, request))
            (own, resource), *stages = collector.spans(1 + len(STAGES))
            self.assertEqual((resource["service.name"], resource["deployment.environment.name"]), ("digits", "test"))
            self.assertEqual((own.trace_id.hex(), own.parent_span_id.hex(), own.trace_state), (TRACE, CALLER, "vendor=1"))
            self.assertEqual((own.name, own.kind), ("POST /v2/models/{name}/infer", Span.SPAN_KIND_SERVER))
            found = attributes(own)
            self.assertEqual((found["http.request.method"], found["http.response.status_code"]), ("POST", 200))
            self.assertEqual([span.name for span, _ in stages], STAGES)
            for span, _ in stages:
                self.assertEqual((span.trace_id, span.parent_span_id), (own.trace_id, own.span_id))
                self.assertLessEqual(own.start_time_unix_nano, span.start_time_unix_nano)
                self.assertLessEqual(span.start_time_unix_nano, span.end_time_unix_nano)
                self.assertLessEqual(span.end_time_unix_nano, own.end_time_unix_nano)
            self.assertEqual(len({span.span_id for span, _ in stages} | {own.span_id}), 1 + len(STAGES))
            self.assertLess(abs(time.time() - own.end_time_unix_nano / 1e9), PATIENCE)
            compute = next(span for span, _ in stages if span.name == "compute")
            self.assertEqual(attributes(compute), {"plimsoll.batch.rows": 1})

    def test_the_caller_decides_and_the_share_where_there_is_none(self):
        with Collector() as collector, tracing(collector) as server:
            infer(server, NOT_SAMPLED)
            infer(server)
            (own, _), *_ = collector.spans(1)
            self.assertEqual(own.parent_span_id, b"")
            self.assertNotEqual(own.trace_id.hex(), TRACE)
        with Collector() as collector, tracing(collector, "--trace-share", "0%") as server:
            infer(server)
            infer(server, SAMPLED)
            (own, _), *_ = collector.spans(1)
            self.assertEqual(own.trace_id.hex(), TRACE)

    def test_a_refusal_is_told(self):
        with Collector() as collector, tracing(collector) as server:
            with self.assertRaises(urllib.error.HTTPError):
                infer(server, SAMPLED, {"inputs": []})
            (own, _), *_ = collector.spans(1)
            found = attributes(own)
            self.assertEqual((found["http.response.status_code"], found["error.type"]), (400, "InvalidArgument"))
            self.assertEqual(own.status.code, Status.STATUS_CODE_UNSET, "the client's mistake")

    def test_grpc(self):
        with Collector() as collector, tracing(collector) as server, grpc.insecure_channel(server.grpc) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            with self.assertRaises(grpc.RpcError) as caught:
                call(b"", timeout=PATIENCE, metadata=[("traceparent", SAMPLED)])
            (own, _), *_ = collector.spans(1)
            found = attributes(own)
            self.assertEqual((own.name, own.trace_id.hex()), ("inference.GRPCInferenceService/ModelInfer", TRACE))
            self.assertEqual(found["rpc.grpc.status_code"], caught.exception.code().value[0])

    def test_the_shadow_is_in_the_trace(self):
        with Collector() as collector, tracing(collector) as shadow:
            url = f"http://{shadow.http}/v2/models/mlp"
            with serving("mlp", "--engine", "tract", "--shadow", url, "--shadow-share", "100%") as server:
                # One that makes no spans itself passes on what it was given.
                infer(server, SAMPLED)
                (own, _), *_ = collector.spans(1)
                self.assertEqual((own.trace_id.hex(), own.parent_span_id.hex()), (TRACE, CALLER))
        with Collector() as collector, tracing(collector) as shadow:
            url = f"http://{shadow.http}/v2/models/mlp"
            with tracing(collector, "--shadow", url, "--shadow-share", "100%") as server:
                infer(server, SAMPLED)
                spans = [span for span, _ in collector.spans(2 + 2 * len(STAGES))]
        parents = {span.parent_span_id.hex(): span for span in spans if span.kind == Span.SPAN_KIND_SERVER}
        first = parents[CALLER]
        self.assertEqual({span.trace_id.hex() for span in spans}, {TRACE})
        self.assertIn(first.span_id.hex(), parents)

    def test_what_the_collector_does_not_take_delays_nobody(self):
        stop = threading.Event()

        def hang():
            stop.wait(PATIENCE)
            return 503, ExportTraceServiceResponse()

        with Collector(hang) as collector, tracing(collector) as server:
            infer(server)
            time.sleep(2)
            begun = time.monotonic()
            # Of 4096 that wait, and one batch that is on its way.
            for _ in range(5000):
                infer(server)
            self.assertLess((time.monotonic() - begun) / 5000, 0.02, "seconds a request")
            self.assertGreater(counts(server).get("dropped", 0), 0)
            stop.set()

    def test_rejected_and_failed_spans_are_counted(self):
        partial = ExportTraceServiceResponse()
        partial.partial_success.rejected_spans = 2
        answers = iter([(400, ExportTraceServiceResponse()), (503, ExportTraceServiceResponse()), (200, partial)])
        with Collector(lambda: next(answers)) as collector, tracing(collector) as server:
            infer(server)
            self.wait(server, {"failed": 6})
            # Sent again after the 503, which passes.
            infer(server)
            self.wait(server, {"failed": 6, "rejected": 2, "exported": 4})

    def wait(self, server, expected):
        end = time.monotonic() + PATIENCE
        while counts(server) != expected and time.monotonic() < end:
            time.sleep(0.1)
        self.assertEqual(counts(server), expected)

    def test_the_last_traces_are_sent_before_the_end(self):
        with Collector() as collector, tracing(collector, "--drain-delay", "0") as server:
            infer(server, SAMPLED)
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(PATIENCE)
            self.assertEqual(len(collector.spans(1)), 1 + len(STAGES))
