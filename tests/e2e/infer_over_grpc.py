"""Asks a model about one picture over gRPC with Triton's own client and prints the logits: infer_over_grpc.py HOST:PORT MODEL"""

import json
import sys

import numpy as np
import tritonclient.grpc as client

# The digit of tests/e2e/traffic.rs: a bar on top and a diagonal.
ROWS = ["00000000", "06666660", "00000060", "00000600", "00006000", "00060000", "00600000", "00000000"]

address, model = sys.argv[1:]
picture = np.array([[int(ink) / 6 for ink in row] for row in ROWS], np.float32).reshape(1, 1, 8, 8)
given = client.InferInput("image", list(picture.shape), "FP32")
given.set_data_from_numpy(picture)
with client.InferenceServerClient(address) as server:
    answer = server.infer(model, [given], client_timeout=10)
output = answer.get_response().outputs[0].name
print(json.dumps(answer.as_numpy(output).ravel().tolist()))
