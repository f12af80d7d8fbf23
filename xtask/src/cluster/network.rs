//! The cluster's addresses: chosen where nothing on the machine uses them.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

/// The bridge that carries the node's address; the apiserver cannot advertise a loopback one.
pub(super) const NODE_BRIDGE: &str = "plimsoll-node";
/// The bridge of the pods.
pub(super) const POD_BRIDGE: &str = "plimsoll-pods";

/// Where a cluster lives. Kept with its state: a running one keeps its addresses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Network {
    /// The node's address, on a bridge of its own.
    pub(super) node: Ipv4Addr,
    /// The first address of the pods' /24.
    pub(super) pods: Ipv4Addr,
    /// The first address of the services' /16.
    pub(super) services: Ipv4Addr,
    /// What is added to every well-known port of the control plane.
    pub(super) port_offset: u16,
}

impl Network {
    pub(super) const DEFAULT: Self = Self {
        node: Ipv4Addr::new(10, 200, 0, 1),
        pods: Ipv4Addr::new(10, 244, 0, 0),
        services: Ipv4Addr::new(10, 96, 0, 0),
        port_offset: 0,
    };

    /// Without a node nothing is routed, and another cluster's ports must stay free.
    pub(super) const CONTROL_PLANE: Self = Self {
        port_offset: 10_000,
        ..Self::DEFAULT
    };

    /// The first of some usual choices that overlaps with no route of the machine.
    ///
    /// # Errors
    /// Where all overlap, or `ip` does not answer.
    pub(super) fn choose() -> Result<Self> {
        let taken = routes()?;
        for step in 0..10 {
            let [pods, services, node] = [244 + step, 96 + step, 200 + step];
            let candidate = Self {
                node: Ipv4Addr::new(10, node, 0, 1),
                pods: Ipv4Addr::new(10, pods, 0, 0),
                services: Ipv4Addr::new(10, services, 0, 0),
                port_offset: 0,
            };
            if candidate.is_free(&taken) {
                return Ok(candidate);
            }
        }
        bail!("every range of addresses that the cluster would use is already routed on this machine (see `ip route`)")
    }

    fn is_free(&self, taken: &[(Ipv4Addr, u8)]) -> bool {
        let wanted = [(self.node, 32), (self.pods, 24), (self.services, 16)];
        !wanted.iter().any(|wanted| taken.iter().any(|taken| overlap(*wanted, *taken)))
    }

    pub(super) fn pod_subnet(&self) -> String {
        format!("{}/24", self.pods)
    }

    pub(super) fn service_subnet(&self) -> String {
        format!("{}/16", self.services)
    }

    /// The address of the Service `kubernetes`.
    pub(super) fn api_service(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.services) + 1)
    }

    /// The address that pods ask for names.
    pub(super) fn dns_service(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.services) + 10)
    }

    pub(super) fn port(&self, well_known: u16) -> u16 {
        well_known + self.port_offset
    }

    /// Says which of `listeners` another program already has.
    ///
    /// # Errors
    /// Where one cannot be bound.
    pub(super) fn check_ports(listeners: &[(Ipv4Addr, u16, &str)]) -> Result<()> {
        for (address, port, name) in listeners {
            TcpListener::bind((*address, *port)).with_context(|| {
                format!("{name} needs {address}:{port}, which another program holds (see `ss -ltnp`): is another Kubernetes running here?")
            })?;
        }
        Ok(())
    }
}

fn overlap(one: (Ipv4Addr, u8), other: (Ipv4Addr, u8)) -> bool {
    let shortest = one.1.min(other.1);
    let mask = u32::MAX.checked_shl(32 - u32::from(shortest)).unwrap_or(0);
    (u32::from(one.0) & mask) == (u32::from(other.0) & mask)
}

/// What the machine routes anywhere but to its default gateway.
fn routes() -> Result<Vec<(Ipv4Addr, u8)>> {
    let output = Command::new("ip")
        .args(["-4", "route", "show", "table", "all"])
        .output()
        .context("cannot start `ip` (iproute2)")?;
    Ok(parse_routes(&String::from_utf8_lossy(&output.stdout)))
}

fn parse_routes(text: &str) -> Vec<(Ipv4Addr, u8)> {
    let destinations = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        match words.next()? {
            "local" | "broadcast" | "unreachable" | "blackhole" | "prohibit" | "unicast" => words.next(),
            destination => Some(destination),
        }
    });
    destinations
        .filter_map(|destination| match destination.split_once('/') {
            Some((address, length)) => Some((address.parse().ok()?, length.parse().ok()?)),
            None => Some((destination.parse().ok()?, 32)),
        })
        // A default route that is written as two halves is still one.
        .filter(|(_, length)| *length > 1)
        .collect()
}

/// Makes the bridge that carries the node's address.
///
/// # Errors
/// Where `ip` fails.
pub(super) fn make_node_bridge(network: &Network) -> Result<()> {
    if !std::path::Path::new("/sys/class/net").join(NODE_BRIDGE).exists() {
        ip(&["link", "add", NODE_BRIDGE, "type", "bridge"])?;
    }
    ip(&["addr", "replace", &format!("{}/32", network.node), "dev", NODE_BRIDGE])?;
    ip(&["link", "set", NODE_BRIDGE, "up"])
}

/// Removes both bridges, where they exist.
///
/// # Errors
/// Where `ip` fails.
pub(super) fn remove_bridges() -> Result<()> {
    for bridge in [POD_BRIDGE, NODE_BRIDGE] {
        if std::path::Path::new("/sys/class/net").join(bridge).exists() {
            ip(&["link", "del", bridge])?;
        }
    }
    Ok(())
}

fn ip(arguments: &[&str]) -> Result<()> {
    super::host::run(Command::new("ip").args(arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: &str = "default via 192.0.2.1 dev eth0\n10.244.0.0/16 dev flannel.1 scope link\n192.0.2.0/24 dev eth0 proto kernel\n\
                          local 10.200.0.1 dev other table local\n0.0.0.0/1 via 10.8.0.1 dev tun0\n";

    #[test]
    fn routes_are_read_but_for_the_default_ones() {
        let expected =
            [("10.244.0.0", 16), ("192.0.2.0", 24), ("10.200.0.1", 32)].map(|(address, length)| (address.parse().unwrap(), length));
        assert_eq!(parse_routes(ROUTES), expected);
    }

    #[test]
    fn a_network_that_overlaps_with_a_route_is_not_free() {
        let taken = parse_routes(ROUTES);
        assert!(!Network::DEFAULT.is_free(&taken));
        assert!(
            Network {
                node: Ipv4Addr::new(10, 201, 0, 1),
                pods: Ipv4Addr::new(10, 245, 0, 0),
                ..Network::DEFAULT
            }
            .is_free(&taken)
        );
        assert!(
            !Network::DEFAULT.is_free(&[(Ipv4Addr::new(10, 0, 0, 0), 8)]),
            "a wide route covers all"
        );
    }
}
