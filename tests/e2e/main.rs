//! End-to-end tests on a real cluster. Each asserts what a user would see with kubectl and an HTTP client.
//!
//! `cargo xtask test` sets the environment:
//!
//! | variable | holds |
//! |---|---|
//! | `KUBECONFIG` | the cluster, with the chart installed as release `plimsoll` in `plimsoll-system` |
//! | `PLIMSOLL_KUBECTL`, `PLIMSOLL_HELM`, `PLIMSOLL_CRANE` | the programs |
//! | `PLIMSOLL_FIXTURE_SERVER_IMAGE` | the file server's image, on the node |
//! | `PLIMSOLL_TRITON_CLIENT` | a Python that has `tritonclient` |
//! | `PLIMSOLL_MAGIKA` | magika's ONNX file; the names of its outputs lie beside it |
//!
//! `control_plane` needs nothing but an apiserver and the operator: where a machine can run no containers, `cargo xtask test` runs it beside a
//! control plane alone, with `KUBECONFIG` and `PLIMSOLL_KUBECTL` set.
//!
//! Tests that disturb what all share (the operator, the registry) take the cluster for themselves; the others run side by side.

mod cluster;
mod commands;
mod control_plane;
mod disruption;
mod drift;
mod history;
mod installation;
mod logs;
mod operator;
mod placement;
mod preprocessing;
mod refusal;
mod reuse;
mod runtime;
mod serving;
mod source;
mod techniques;
mod traffic;
mod watch;
