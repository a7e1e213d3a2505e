# The image holds one static binary and the system's CA certificates: no shell,
# no package manager, no root.

FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -o /cedarpost ./cmd/cedarpost
# A volume that is mounted here takes over this owner.
RUN mkdir -p /data && chown 65532:65532 /data && chmod 700 /data

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build --chown=65532:65532 /data /var/lib/cedarpost
COPY --from=build /cedarpost /cedarpost
USER 65532:65532
WORKDIR /var/lib/cedarpost
# Decision plane, admin plane, operations (health and metrics).
EXPOSE 8080 8081 9090
# There is no curl in here: the binary asks its own operations listener.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 CMD ["/cedarpost", "health"]
ENTRYPOINT ["/cedarpost"]
CMD ["serve"]
