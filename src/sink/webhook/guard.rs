//! The addresses that requests may go to.
//!
//! A name is judged by its resolved addresses. The check and the connection share one resolver, so that a name cannot
//! change its address between them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::Host;

/// The zone of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Zone {
    /// The internet.
    Public,
    /// This machine or its own network.
    Private,
    /// Zones without receivers, but possibly with machine credentials: link-local, metadata, multicast, reserved.
    Forbidden,
}

/// Zones of IPv4 networks, by first address and prefix length. All other addresses are public.
const V4: &[(Ipv4Addr, u32, Zone)] = &[
    (Ipv4Addr::UNSPECIFIED, 8, Zone::Forbidden),
    (Ipv4Addr::new(10, 0, 0, 0), 8, Zone::Private),
    // The metadata service of one cloud, in the shared address space of providers.
    (Ipv4Addr::new(100, 100, 100, 200), 32, Zone::Forbidden),
    (Ipv4Addr::new(100, 64, 0, 0), 10, Zone::Private),
    (Ipv4Addr::new(127, 0, 0, 0), 8, Zone::Private),
    // The metadata service of another cloud, which looks public.
    (Ipv4Addr::new(168, 63, 129, 16), 32, Zone::Forbidden),
    (Ipv4Addr::new(169, 254, 0, 0), 16, Zone::Forbidden),
    (Ipv4Addr::new(172, 16, 0, 0), 12, Zone::Private),
    (Ipv4Addr::new(192, 0, 0, 0), 24, Zone::Forbidden),
    (Ipv4Addr::new(192, 0, 2, 0), 24, Zone::Forbidden),
    (Ipv4Addr::new(192, 88, 99, 0), 24, Zone::Forbidden),
    (Ipv4Addr::new(192, 168, 0, 0), 16, Zone::Private),
    (Ipv4Addr::new(198, 18, 0, 0), 15, Zone::Private),
    (Ipv4Addr::new(198, 51, 100, 0), 24, Zone::Forbidden),
    (Ipv4Addr::new(203, 0, 113, 0), 24, Zone::Forbidden),
    (Ipv4Addr::new(224, 0, 0, 0), 3, Zone::Forbidden),
];

/// Zones of IPv6 networks. All other addresses are forbidden.
const V6: &[(Ipv6Addr, u32, Zone)] = &[
    (Ipv6Addr::LOCALHOST, 128, Zone::Private),
    (Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0), 32, Zone::Forbidden),
    (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7, Zone::Private),
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23, Zone::Forbidden),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32, Zone::Forbidden),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20, Zone::Forbidden),
    (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3, Zone::Public),
];

/// IPv6 networks that contain IPv4 addresses: prefix length, and the shift of the IPv4 address.
const V4_IN_V6: &[(Ipv6Addr, u32, u32)] = &[
    (Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96, 0),
    (Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96, 0),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16, 80),
];

fn has_prefix(address: Ipv6Addr, network: Ipv6Addr, bits: u32) -> bool {
    (address.to_bits() ^ network.to_bits()) >> (128 - bits) == 0
}

impl Zone {
    /// Returns the zone of an address.
    pub(super) fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => Self::of_v6(address),
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        let is_in = |network: &Ipv4Addr, bits: u32| (address.to_bits() ^ network.to_bits()) >> (32 - bits) == 0;
        let known = V4.iter().find(|(network, bits, _)| is_in(network, *bits));
        known.map_or(Self::Public, |(_, _, zone)| *zone)
    }

    fn of_v6(address: Ipv6Addr) -> Self {
        if let Some((_, _, shift)) = V4_IN_V6.iter().find(|(network, bits, _)| has_prefix(address, *network, *bits)) {
            let bits = u32::try_from(address.to_bits() >> shift & u128::from(u32::MAX)).expect("32 bits are left");
            return Self::of_v4(Ipv4Addr::from_bits(bits));
        }
        let known = V6.iter().find(|(network, bits, _)| has_prefix(address, *network, *bits));
        known.map_or(Self::Forbidden, |(_, _, zone)| *zone)
    }
}

/// The reason why there is no address to connect to.
#[derive(Debug, thiserror::Error)]
pub(super) enum AddressError {
    #[error("cannot resolve `{0}`")]
    Unresolved(String, #[source] io::Error),
    #[error("`{0}` has no address")]
    NoAddress(String),
    #[error("{0} is a private address: set `allow_private = true` to allow it")]
    Private(IpAddr),
    #[error("{0} is not allowed: it is link-local, reserved, multicast or a metadata service")]
    Forbidden(IpAddr),
}

/// Restricts connections to allowed addresses.
#[derive(Debug, Clone, Copy)]
pub(super) struct AddressGuard {
    pub(super) allow_private: bool,
}

impl AddressGuard {
    /// Checks whether requests may go to an address.
    pub(super) fn check(self, address: IpAddr) -> Result<(), AddressError> {
        match Zone::of(address) {
            Zone::Public => Ok(()),
            Zone::Private if self.allow_private => Ok(()),
            Zone::Private => Err(AddressError::Private(address)),
            Zone::Forbidden => Err(AddressError::Forbidden(address)),
        }
    }

    /// Returns the allowed addresses of a URL, at least one.
    pub(super) async fn addresses(self, url: &Url) -> Result<Vec<SocketAddr>, AddressError> {
        let port = url.port_or_known_default().unwrap_or_default();
        match url.host() {
            Some(Host::Domain(name)) => self.resolve(name, port).await,
            Some(Host::Ipv4(address)) => self.among("", vec![SocketAddr::new(address.into(), port)]),
            Some(Host::Ipv6(address)) => self.among("", vec![SocketAddr::new(address.into(), port)]),
            None => Err(AddressError::NoAddress(String::new())),
        }
    }

    async fn resolve(self, name: &str, port: u16) -> Result<Vec<SocketAddr>, AddressError> {
        let found = tokio::net::lookup_host((name, port)).await;
        let found = found.map_err(|error| AddressError::Unresolved(name.to_owned(), error))?;
        self.among(name, found.collect())
    }

    /// Returns the allowed addresses of a name.
    fn among(self, name: &str, found: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, AddressError> {
        let (mut admitted, mut refusal) = (Vec::new(), None);
        for address in found {
            match self.check(address.ip()) {
                Ok(()) => admitted.push(address),
                Err(error) => refusal = Some(error),
            }
        }
        if admitted.is_empty() {
            return Err(refusal.unwrap_or_else(|| AddressError::NoAddress(name.to_owned())));
        }
        Ok(admitted)
    }
}

impl Resolve for AddressGuard {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = *self;
        Box::pin(async move {
            // The caller sets the port of the URL.
            let addresses = Self::resolve(guard, name.as_str(), 0).await?;
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(address: &str) -> Zone {
        Zone::of(address.parse().unwrap())
    }

    #[test]
    fn every_address_has_its_zone() {
        let public = [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "168.63.129.15",
            "169.253.255.255",
            "172.15.255.255",
            "172.32.0.0",
            "192.167.255.255",
            "192.169.0.0",
            "223.255.255.255",
            "2001:200::1",
            "2606:4700::1111",
            "::ffff:1.1.1.1",
            "64:ff9b::1.1.1.1",
            "2002:101:101::1",
        ];
        let private = [
            "10.0.0.0",
            "10.255.255.255",
            "100.64.0.0",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "172.16.0.0",
            "172.31.255.255",
            "192.168.0.1",
            "198.19.255.255",
            "::1",
            "fc00::1",
            "fdff::1",
            "::ffff:127.0.0.1",
            "::ffff:10.1.2.3",
            "64:ff9b::10.0.0.1",
            "2002:a00:1::1",
        ];
        let forbidden = [
            "0.0.0.0",
            "0.1.2.3",
            "100.100.100.200",
            "168.63.129.16",
            "169.254.0.0",
            "169.254.169.254",
            "192.0.0.192",
            "192.0.2.1",
            "192.88.99.1",
            "198.51.100.7",
            "203.0.113.7",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::7f00:1",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "3fff::1",
            "5f00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "::ffff:169.254.169.254",
            "::ffff:0.0.0.0",
            "64:ff9b::169.254.169.254",
            "2002:a9fe:a9fe::1",
        ];
        for (addresses, expected) in
            [(&public[..], Zone::Public), (&private, Zone::Private), (&forbidden, Zone::Forbidden)]
        {
            for address in addresses {
                assert_eq!(zone(address), expected, "{address}");
            }
        }
    }

    #[test]
    fn only_allowed_addresses_of_a_name_are_used() {
        let among = |allow_private, found: &[&str]| {
            let found = found.iter().map(|address| SocketAddr::new(address.parse().unwrap(), 443)).collect();
            let admitted = AddressGuard { allow_private }.among("siem", found).map_err(|error| error.to_string());
            admitted.map(|addresses| addresses.iter().map(|a| a.ip().to_string()).collect::<Vec<_>>())
        };
        let mixed = ["169.254.169.254", "10.0.0.1", "1.1.1.1", "::1"];
        assert_eq!(among(false, &mixed).unwrap(), ["1.1.1.1"]);
        assert_eq!(among(true, &mixed).unwrap(), ["10.0.0.1", "1.1.1.1", "::1"]);
        assert_eq!(
            among(false, &["10.0.0.1"]).unwrap_err(),
            "10.0.0.1 is a private address: set `allow_private = true` to allow it"
        );
        assert!(among(true, &["169.254.169.254"]).unwrap_err().contains("is not allowed"));
        assert_eq!(among(true, &[]).unwrap_err(), "`siem` has no address");
    }
}
