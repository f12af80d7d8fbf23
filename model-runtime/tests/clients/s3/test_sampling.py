"""Samples of requests in an S3 bucket: the server is moto's, the client that looks is Amazon's."""

import json
import os
import unittest
import urllib.request

import boto3
from moto.server import ThreadedMotoServer
from serving import Server

BUCKET = "samples"


class Sampling(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        store.start()
        cls.addClassCleanup(store.stop)
        host, port = store.get_host_and_port()
        # What the runtime reads is what boto3 reads, but for the last: TLS is asked for unless one says otherwise.
        os.environ.update(
            AWS_ENDPOINT_URL=f"http://{host}:{port}",
            AWS_ACCESS_KEY_ID="key",
            AWS_SECRET_ACCESS_KEY="secret",
            AWS_REGION="us-east-1",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_ALLOW_HTTP="true",
        )
        cls.client = boto3.client("s3")
        cls.client.create_bucket(Bucket=BUCKET)

    def ask(self, server, values, name="mlp"):
        body = {"id": "a-1", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": values}]}
        url = f"http://{server.http}/v2/models/{name}/infer"
        with urllib.request.urlopen(url, json.dumps(body).encode()) as answer:
            return json.load(answer)["outputs"][0]["data"]

    def objects(self, prefix):
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        read = lambda one: self.client.get_object(Bucket=BUCKET, Key=one["Key"])["Body"].read().decode()
        return {one["Key"]: [json.loads(line) for line in read(one).splitlines()] for one in found}

    def test_every_sample_is_there_when_the_server_has_stopped(self):
        server = Server("mlp", "--engine", "tract", "--drain-delay", "0", "--sample-to", f"s3://{BUCKET}/all", "--sample-share", "100%")
        self.addCleanup(server.stop)
        answers = [self.ask(server, [value, 0.5, -1, 2]) for value in range(20)]
        server.process.terminate()
        self.assertEqual(server.process.wait(60), 0)
        objects = self.objects("all/")
        self.assertEqual(len(objects), 1, objects.keys())
        ((key, lines),) = objects.items()
        self.assertTrue(key.startswith("all/model=mlp/version=1/") and key.endswith(".jsonl"), key)
        self.assertEqual([line["x"] for line in lines], [[value, 0.5, -1, 2] for value in range(20)])
        self.assertEqual([line["_request"]["outputs"]["y"] for line in lines], answers)

    def test_a_bucket_that_is_not_there_fails_no_request(self):
        server = Server("mlp", "--engine", "tract", "--drain-delay", "0", "--sample-to", "s3://no-such-bucket/all", "--sample-share", "100%")
        self.addCleanup(server.stop)
        self.ask(server, [1, 2, 3, 4])
        server.process.terminate()
        self.assertEqual(server.process.wait(60), 0)
