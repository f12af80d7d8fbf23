//! The demonstration: a new user sees a model go the whole way, from `kubectl apply` to answers, to a second version, and back.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::progress::phase;
use crate::{images, workspace};
use artifacts::Artifacts;
use digit::HeldOut;
use gateway::Gateway;
use record::Record;
use rollout::Rollout;
use target::Target;
use traffic::{FirstAnswer, Traffic};

mod artifacts;
mod digit;
mod gateway;
mod installation;
mod local;
mod manifest;
mod record;
mod rollout;
mod target;
mod timeline;
mod traffic;

/// The namespace of the demo's model.
const NAMESPACE: &str = "plimsoll-demo";
/// The model's name, as the manifest has it.
const MODEL: &str = "digits";

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Takes away what the demo made: the embedded cluster, or its objects in the cluster of KUBECONFIG.
    #[arg(long, conflicts_with_all = ["local", "image_registry"])]
    down: bool,
    /// Needs no cluster: optimises, serves and asks on this machine.
    #[arg(long, conflicts_with_all = ["kubeconfig", "image_registry"])]
    local: bool,
    /// The cluster to use. Default: the one of KUBECONFIG where it answers, else the embedded one.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// A registry that you can push to and the nodes of your cluster pull from, for the demo's images. kind and k3d need none.
    #[arg(long, value_name = "HOST/PATH")]
    image_registry: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.local {
        return local::run();
    }
    if arguments.down {
        return match Target::existing(arguments.kubeconfig.as_deref())? {
            Some(foreign) => installation::remove(&foreign),
            None => crate::cluster::down(),
        };
    }
    let target = Target::choose(arguments.kubeconfig.as_deref())?;
    let delivery = target.delivery(arguments.image_registry.as_deref())?;
    let held_out = HeldOut::read(&workspace::root().join("tests/models/digits/digits-heldout.npz"))?;

    heading(1, "The images");
    let archives = images::build(&installation::IMAGES)?;
    heading(2, "The cluster");
    let target = target.start()?;
    installation::install(&target, &delivery, &archives)?;
    let gateway = phase("opening a way to the cluster's API (kubectl proxy)", |_| Gateway::open(&target))?;
    let artifacts = Artifacts::new(gateway.client());
    phase("uploading the models and the held-out images to the cluster's registry", |_| {
        artifacts.upload_models()
    })?;

    heading(3, "The first version");
    let accelerated = target.has_gpus()?;
    if !accelerated {
        eprintln!("  no node offers {}: the model is served on CPUs", manifest::GPU);
    }
    Rollout::clear(&target)?;
    let rollout = Rollout::new(&target, &gateway, accelerated);
    let answered = FirstAnswer::wait(&gateway.client(), &infer_path(), &held_out);
    let first = rollout.apply("v1")?;
    let (answered_at, answer) = answered.take()?;
    let mut record = Record::new(&first, answered_at, artifacts.report(&first.artifact)?);
    record.seconds_by_phase = timeline::seconds_by_phase(&target, &first, &record.report)?;
    record.nodes = target.nodes_of_pods()?;
    if let Some(job_s) = timeline::job_seconds(&target, &first)? {
        record.compared(job_s, local::bare_seconds()?);
    }
    println!("\n{}\n", record.table());
    println!("{answer}\n");

    heading(4, "A second version under load, and back");
    let traffic = Traffic::start(&gateway.client(), &infer_path(), &held_out);
    let moved = rollout.apply("v2").and_then(|second| Ok((second, rollout.apply("v1")?)));
    let counted = traffic.stop();
    let (second, undone) = moved?;
    record.moved(&second, &undone, counted);
    Rollout::clear(&target)?;
    let answered = FirstAnswer::wait(&gateway.client(), &infer_path(), &held_out);
    let again = rollout.apply_pinned("v1", &record.report.summary)?;
    record.applied_again(&again, answered.take()?.0);
    println!("\n{}\n", record.story());

    let path = record.write()?;
    println!("{}", target.kubectl_text(&["get", "md,mr", "--namespace", NAMESPACE])?);
    println!("Written to {}. To go on playing:\n", path.display());
    println!("{}", commands(&target, arguments));
    if record.requests_failed > 0 {
        bail!(
            "{} of {} requests failed: {}",
            record.requests_failed,
            record.requests_total,
            record.first_failure.as_deref().unwrap_or("?")
        );
    }
    Ok(())
}

/// Where the apiserver forwards requests to the model.
fn infer_path() -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/services/http:{MODEL}:http/proxy/v2/models/{MODEL}/infer")
}

/// Parts of the demo.
const PARTS: usize = 4;

fn heading(number: usize, what: &str) {
    eprintln!("\n[{number}/{PARTS}] {what}");
}

fn commands(target: &Target, arguments: &Arguments) -> String {
    let mut commands = Vec::new();
    commands.extend(
        target
            .kubectl_folder()
            .map(|folder| format!("export PATH={}:$PATH", folder.display())),
    );
    commands.push(format!("export KUBECONFIG={}", target.kubeconfig_text()));
    for command in [
        "get md,mr -o wide",
        "describe md digits",
        "scale md digits --replicas 1",
        "edit md digits",
        "get mr --watch",
    ] {
        commands.push(format!("kubectl -n {NAMESPACE} {command}"));
    }
    commands.push("kubectl explain md.spec.optimize.budget".to_owned());
    let again = arguments
        .kubeconfig
        .as_ref()
        .map(|path| format!(" --kubeconfig {}", path.display()));
    commands.push(format!(
        "cargo xtask demo --down{}    # takes everything away",
        again.unwrap_or_default()
    ));
    format!("  {}", commands.join("\n  "))
}

/// Seconds since `begun`.
fn seconds_since(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64()
}
