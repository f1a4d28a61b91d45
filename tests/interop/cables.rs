//! Two namespaces with a switch between them, each at the far end of a veth pair whose near end is a port of the switch.
//!
//! Owns the cables: an interface that is deleted goes at once, where a namespace that ends takes its own along only some time later.

use super::namespaces::{Namespace, run, try_run};
use super::switch::Switch;

/// The addresses of the far ends.
pub(crate) const A: &str = "198.51.100.1";
pub(crate) const B: &str = "198.51.100.2";

/// What a veth pair is like.
#[derive(Clone, Copy)]
pub(crate) enum Cable {
    /// As the kernel makes it: checksums and segmentation are left undone.
    Plain,
    /// With so many queues, and what is sent at the far end is finished: XDP knows nothing of checksums that are left undone.
    Finished(usize),
}

impl Cable {
    /// The near end of a new one, whose far end, `far`, is in `namespace`.
    pub(crate) fn lay(self, which: &str, namespace: &Namespace, address: &str) -> String {
        let near = format!("cwc{which}{}", std::process::id() % 1_000_000);
        let queues = match self {
            Cable::Plain => String::new(),
            Cable::Finished(queues) => format!("numrxqueues {queues} numtxqueues {queues}"),
        };
        let far = format!("peer name far netns {}", namespace.name);
        run(&format!("ip link add {near} {queues} type veth {far} {queues}"));
        run(&format!("ip link set {near} up"));
        if matches!(self, Cable::Finished(_)) {
            namespace.run("ethtool -K far tx off");
        }
        namespace.set_up("far", address);
        near
    }
}

/// The two namespaces, and the switch between them.
pub(crate) struct Pair {
    pub(crate) a: Namespace,
    pub(crate) b: Namespace,
    pub(crate) switch: Switch,
    pub(crate) ends: [String; 2],
}

impl Pair {
    /// A switch with `switch` in its `[switch]` and two ports of this kind, with `keys`.
    pub(crate) fn with(switch: &str, kind: &str, keys: &str, cable: Cable) -> Self {
        let (a, b) = (Namespace::new("a"), Namespace::new("b"));
        let ends = [cable.lay("a", &a, A), cable.lay("b", &b, B)];
        let switch = Switch::of_text(&config(switch, &ends, kind, keys));
        a.waits_for(B);
        Self { a, b, switch, ends }
    }

    /// Bits a second of TCP from `a` to `b`.
    pub(crate) fn tcp(&self, options: &str) -> f64 {
        let _server = self.b.iperf3_server();
        self.a.iperf3(B, 2, options)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.ends.iter().for_each(|end| drop(try_run(&format!("ip link del {end}"))));
    }
}

/// A switch of two ports.
fn config(switch: &str, ends: &[String; 2], kind: &str, keys: &str) -> String {
    let port =
        |(name, end)| format!("[[port]]\nname = \"{name}\"\nkind = \"{kind}\"\ndevice = \"{end}\"\n{keys}\n");
    let ports: String = ["a", "b"].iter().zip(ends).map(port).collect();
    format!("[switch]\nworkers = [1]\n{switch}\n{ports}")
}
