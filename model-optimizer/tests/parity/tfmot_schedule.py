"""Records tfmot_schedule.json: what tfmot.sparsity.keras.PolynomialDecay says at each step.

    pip install tensorflow-cpu==2.15.1 tf_keras==2.15.1 tensorflow-model-optimization==0.8.0
    python3 tfmot_schedule.py > tfmot_schedule.json
"""

import json
import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

from tensorflow_model_optimization.sparsity.keras import PolynomialDecay

cases = []
for initial, final, end_step, frequency in [(0.5, 0.8, 1000, 10), (0.0, 0.9, 1000, 10), (0.1, 0.55, 240, 2), (0.0, 0.6, 7, 1)]:
    schedule = PolynomialDecay(initial, final, begin_step=0, end_step=end_step, power=3, frequency=frequency)
    steps = sorted({*range(0, end_step + 1, max(1, end_step // 60)), 1, 2, end_step - 1, end_step})
    said = [schedule(step) for step in steps]
    case = {"initial": initial, "final": final, "end_step": end_step, "frequency": frequency, "steps": steps}
    case["prunes"] = [bool(prunes) for prunes, _ in said]
    case["sparsity"] = [round(float(sparsity), 7) for _, sparsity in said]
    cases.append(case)
print("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]")
