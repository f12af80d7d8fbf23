"""Records scikit-learn's metrics on small random data, for the unit tests of src/evaluate/metric.rs.

    pip install scikit-learn==1.9.1 numpy==2.4.6 && python metrics.py > metrics.json
"""

import json

import numpy as np
from sklearn import metrics

rng = np.random.default_rng(7)
cases = []


def record(name, metric, labels, values, expected):
    cases.append(
        {
            "name": name,
            "metric": metric,
            "samples": len(labels),
            "labels": np.asarray(labels, float).ravel().tolist(),
            "values": np.round(np.asarray(values, float), 6).ravel().tolist(),
            "expected": float(expected),
        }
    )


def softmax(scores):
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def scored(classes, samples=40):
    labels = rng.integers(0, classes, samples)
    scores = np.round(rng.normal(size=(samples, classes)) + 1.2 * np.eye(classes)[labels], 6)
    return labels, scores


for classes in (2, 4, 12):
    labels, scores = scored(classes)
    predicted = scores.argmax(axis=1)
    record(f"accuracy of {classes}", "Accuracy", labels, scores, metrics.accuracy_score(labels, predicted))
    record(f"F1 of {classes}", "F1", labels, scores, metrics.f1_score(labels, predicted, average="macro", zero_division=0))
    if classes > 5:
        top = metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(classes))
        record(f"top 5 of {classes}", "Top5Accuracy", labels, scores, top)
    if classes > 2:
        area = metrics.roc_auc_score(labels, softmax(scores), multi_class="ovr", average="macro")
        record(f"AUROC of the logits of {classes}", "Auroc", labels, scores, area)

# A class that is predicted and never a label, and one that is a label and never predicted.
record("F1 with strangers", "F1", [0, 1, 1, 2], np.eye(4)[[0, 1, 3, 0]], metrics.f1_score([0, 1, 1, 2], [0, 1, 3, 0], average="macro", zero_division=0))

labels = rng.integers(0, 2, 50)
one = np.round(rng.normal(size=50) + labels, 1)
record("AUROC of one score with ties", "Auroc", labels, one, metrics.roc_auc_score(labels, one))
pair = np.round(np.stack([-one / 2, one / 2], axis=1), 6)
record("AUROC of two scores", "Auroc", labels, pair, metrics.roc_auc_score(labels, pair[:, 1] - pair[:, 0]))

labels = np.round(rng.normal(size=30) * 5, 3)
values = np.round(labels + rng.normal(size=30), 3)
record("MAE", "MeanAbsoluteError", labels, values, metrics.mean_absolute_error(labels, values))
record("RMSE", "RootMeanSquaredError", labels, values, metrics.root_mean_squared_error(labels, values))
record("R2", "R2", labels, values, metrics.r2_score(labels, values))

labels = np.round(rng.normal(size=(20, 3)) * 5, 3)
values = np.round(labels + rng.normal(size=(20, 3)), 3)
record("MAE of three", "MeanAbsoluteError", labels, values, metrics.mean_absolute_error(labels, values))
record("RMSE of three", "RootMeanSquaredError", labels, values, metrics.root_mean_squared_error(labels, values))
record("R2 of three", "R2", labels, values, metrics.r2_score(labels, values))

print("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]")
