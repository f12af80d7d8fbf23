"""Schemathesis: requests made from the OpenAPI document that is served, and answers held against it."""

import pathlib
import subprocess
import sys
import tempfile
import unittest

from serving import serving

HERE = pathlib.Path(__file__).parent
PROGRAM = pathlib.Path(sys.executable).parent / "st"


class Document(unittest.TestCase):
    def check(self, model):
        # It keeps notes where it runs.
        with serving(model, "--engine", "tract") as server, tempfile.TemporaryDirectory() as folder:
            command = [PROGRAM, "--config-file", HERE / "schemathesis.toml", "run", f"http://{server.http}/v2/openapi.json"]
            options = ["--phases", "coverage,fuzzing", "--max-examples", "50", "--generation-deterministic", "--no-color", "--warnings", "off"]
            result = subprocess.run([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
        self.assertEqual(result.returncode, 0, result.stdout)
        # Each operation was asked something.
        self.assertRegex(result.stdout, r"Selected: (\d+)/\1\n  Tested: \1\n")

    def test_tensors(self):
        self.check("mlp")

    def test_every_type(self):
        self.check("every-type")

    def test_texts(self):
        self.check("sentences/sentences")

    def test_images(self):
        self.check("pictures/pictures")
