//! `plimsoll-operator`: parses flags and runs the control plane.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use plimsoll_operator::settings::Settings;
use plimsoll_operator::{controller, health, lease, metrics};
use plimsoll_package::registry::{Access, Credentials, Registry};
use plimsoll_package::units::Size;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How long passes that are under way at the stop may still take; they are short writes.
const LAST_PASSES: Duration = Duration::from_secs(2);

/// The control plane of Plimsoll.
#[derive(Parser)]
#[command(version)]
struct Flags {
    /// Repository that Jobs push artifacts to, HOST[:PORT]/PATH.
    #[arg(long)]
    registry_push: String,
    /// The same repository as kubelets pull from it. Default: as it is pushed to.
    #[arg(long)]
    registry_pull: Option<String>,
    /// The registry is pushed to in plain HTTP.
    #[arg(long)]
    registry_plain_http: bool,
    /// Name of the dockerconfigjson secret, in each model's namespace, that Jobs push with.
    #[arg(long)]
    registry_push_secret: Option<String>,
    /// Name of the dockerconfigjson secret, in each model's namespace, that kubelets pull with.
    #[arg(long)]
    registry_pull_secret: Option<String>,
    /// Folder with the operator's own credentials for the registry.
    #[arg(long)]
    registry_credentials: Option<PathBuf>,
    /// A further host, HOST[:PORT], that is spoken to in plain HTTP. May be repeated.
    #[arg(long = "plain-http-host")]
    plain_http_hosts: Vec<String>,
    /// The optimiser's image.
    #[arg(long)]
    optimizer_image: String,
    /// The runtime's image.
    #[arg(long)]
    runtime_image: String,
    /// The runtime's image with CUDA, for models whose accelerator is a resource of nvidia.com; without it, theirs is the runtime's
    /// image, too.
    #[arg(long)]
    cuda_runtime_image: Option<String>,
    /// Name of a dockerconfigjson secret, in each model's namespace, that kubelets pull both with. May be repeated.
    #[arg(long = "image-pull-secret")]
    image_pull_secrets: Vec<String>,
    /// Pull policy of both.
    #[arg(long, default_value = "IfNotPresent", value_parser = ["Always", "IfNotPresent", "Never"])]
    image_pull_policy: String,
    /// A namespace to work in; may be repeated. Default: all.
    #[arg(long = "watch-namespace")]
    watch_namespaces: Vec<String>,
    /// Namespace of the leader's Lease.
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    lease_namespace: String,
    /// This process's name in the Lease and in Events.
    #[arg(long, env = "POD_NAME", default_value = "plimsoll-operator")]
    pod_name: String,
    /// Address of /healthz and /readyz.
    #[arg(long, default_value = "127.0.0.1:8081")]
    health_address: SocketAddr,
    /// Address of /metrics.
    #[arg(long, default_value = "127.0.0.1:8080")]
    metrics_address: SocketAddr,
    /// Name of the ConfigMap, in each model's namespace, whose key ca.crt holds more root certificates for Jobs.
    #[arg(long)]
    extra_ca_configmap: Option<String>,
    /// Largest source or dataset that a Job fetches.
    #[arg(long, default_value = "100Gi")]
    max_fetch_size: Size,
    /// Whether artifacts are mounted as image volumes; auto asks the apiserver for its version (1.36 and later have them).
    #[arg(long, default_value = "auto")]
    image_volumes: ImageVolumes,
    /// Form of the log.
    #[arg(long, default_value = "json")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum ImageVolumes {
    Auto,
    Always,
    Never,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Json,
    Text,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info,kube=warn".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    match flags.log_format {
        LogFormat::Json => log.json().flatten_event(true).with_current_span(true).with_span_list(false).init(),
        LogFormat::Text => log.init(),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build();
    match runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(flags)))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the operator stops");
            ExitCode::FAILURE
        }
    }
}

async fn run(flags: Flags) -> anyhow::Result<()> {
    plimsoll_package::registry::install_crypto_provider();
    let client = Client::try_default()
        .await
        .context("cannot find the cluster; run inside of one or set KUBECONFIG")?;
    let (stop, stopped) = watch::channel(false);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        let _ = stop.send(true);
    });

    let metrics = Arc::new(metrics::Metrics::default());
    let ready = Arc::new(AtomicBool::new(false));
    let health = tokio::spawn(health::serve_health(flags.health_address, ready.clone()));
    let exposition = tokio::spawn(health::serve_metrics(flags.metrics_address, metrics.clone()));
    let context = Arc::new(context(&flags, &client, metrics.clone()).await?);
    ready.store(true, Ordering::Relaxed);

    let mut election = lease::Election::new(client, &flags.lease_namespace, flags.pod_name.clone());
    let work = async {
        tokio::select! {
            () = election.acquire() => {}
            () = wait(stopped.clone()) => return Ok(()),
        }
        tracing::info!(identity = flags.pod_name, "leading");
        metrics.set_leader(true);
        let namespaces: Vec<Option<String>> = if flags.watch_namespaces.is_empty() {
            vec![None]
        } else {
            flags.watch_namespaces.iter().cloned().map(Some).collect()
        };
        let controllers = namespaces
            .into_iter()
            .map(|namespace| controller::run(context.clone(), namespace, wait(stopped.clone())));
        let ended = async {
            wait(stopped.clone()).await;
            tokio::time::sleep(LAST_PASSES).await;
        };
        tokio::select! {
            _ = futures::future::join_all(controllers) => {}
            // A controller was seen to outlive its stop by half a minute, for which nobody would lead.
            () = ended => {}
            // Another may lead now; whatever this process still has in hand must not be written.
            () = election.keep() => anyhow::bail!("the lease was lost"),
        }
        election.release().await;
        anyhow::ensure!(*stopped.borrow(), "a controller ended by itself");
        Ok(())
    };
    tokio::select! {
        done = work => done,
        failed = health => failed?.context("cannot serve health"),
        failed = exposition => failed?.context("cannot serve metrics"),
    }
}

async fn wait(mut stopped: watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

async fn context(flags: &Flags, client: &Client, metrics: Arc<metrics::Metrics>) -> anyhow::Result<controller::Context> {
    let image_volumes = match flags.image_volumes {
        ImageVolumes::Always => true,
        ImageVolumes::Never => false,
        ImageVolumes::Auto => {
            let version = client.apiserver_version().await.context("cannot reach the apiserver")?;
            let minor: u32 = version.minor.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0);
            version.major != "1" || minor >= 36
        }
    };
    let mut plain_http_hosts = flags.plain_http_hosts.clone();
    if flags.registry_plain_http {
        plain_http_hosts.extend(flags.registry_push.split('/').next().map(Into::into));
    }
    let credentials = match &flags.registry_credentials {
        Some(folder) => Credentials::read(folder).with_context(|| format!("cannot read {}", folder.display()))?,
        None => Credentials::default(),
    };
    let registry = Registry::new(Access {
        credentials,
        plain_http_hosts: plain_http_hosts.clone(),
        extra_ca: None,
    })?;
    let recorder = Recorder::new(
        client.clone(),
        Reporter {
            controller: "plimsoll-operator".into(),
            instance: Some(flags.pod_name.clone()),
        },
    );
    let settings = Settings {
        registry_pull: flags.registry_pull.clone().unwrap_or_else(|| flags.registry_push.clone()),
        registry_push: flags.registry_push.clone(),
        registry_push_secret: flags.registry_push_secret.clone(),
        registry_pull_secret: flags.registry_pull_secret.clone(),
        plain_http_hosts,
        extra_ca_config_map: flags.extra_ca_configmap.clone(),
        optimizer_image: flags.optimizer_image.clone(),
        runtime_image: flags.runtime_image.clone(),
        cuda_runtime_image: flags.cuda_runtime_image.clone(),
        image_pull_secrets: flags.image_pull_secrets.clone(),
        image_pull_policy: flags.image_pull_policy.clone(),
        image_volumes,
        max_fetch_size: flags.max_fetch_size.clone(),
        toolchain: env!("CARGO_PKG_VERSION").into(),
    };
    Ok(controller::Context {
        client: client.clone(),
        settings,
        registry,
        recorder,
        metrics,
    })
}
