# Builds with BuildKit and with the classic builder. The dependencies have their own layer, which is rebuilt only when
# Cargo.toml or Cargo.lock change.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
# The configuration has compiler flags without which build/ refuses to build.
COPY .cargo .cargo
COPY build build
COPY Cargo.toml Cargo.lock ./
# Cargo reads the manifest of each workspace member, although only the daemon is built.
COPY bench/Cargo.toml bench/
RUN mkdir src bench/src && echo 'fn main() {}' | tee bench/src/main.rs >src/main.rs && touch src/lib.rs \
 && cargo build --profile dist --locked --lib --bins \
 && rm -r src
COPY config config
COPY clients clients
COPY src src
# COPY keeps the file times. Without the touch, the empty crate above would count as newer.
RUN touch src/main.rs src/lib.rs \
 && cargo build --profile dist --locked --lib --bins \
 && mkdir -p /root-fs/aurora-bus/data /root-fs/usr/local/bin /root-fs/usr/share/doc/aurora-bus \
 && cp target/dist/aurora-bus /root-fs/usr/local/bin/
COPY LICENSE /root-fs/usr/share/doc/aurora-bus/
COPY config /root-fs/aurora-bus/config

FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="aurora-bus" \
      org.opencontainers.image.description="An event bus for security operations centres" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /root-fs/usr /usr
COPY --from=build --chown=65532:65532 /root-fs/aurora-bus /aurora-bus
# The daemon reads config/aurora-bus.toml and writes data/ in its working directory.
WORKDIR /aurora-bus
# Loopback cannot be reached from outside of the container. The daemon refuses any other address until the
# configuration requires credentials or turns them off ([auth]).
ENV AURORA_BUS__HTTP__LISTEN=0.0.0.0:8080
VOLUME /aurora-bus/data
EXPOSE 8080
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 CMD ["/usr/local/bin/aurora-bus", "health"]
ENTRYPOINT ["/usr/local/bin/aurora-bus"]
CMD ["serve"]
