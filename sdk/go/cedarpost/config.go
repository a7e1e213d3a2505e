package cedarpost

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/cedarpost/cedarpost/internal/clienttls"
	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/internal/serverurl"
)

// Config says how to reach the service and how to keep its answers. The zero value
// works and fails closed: it takes servers and key from the environment, keeps answers,
// and reuses none that may be more than 5 s old.
type Config struct {
	// Servers are the URLs of the decision plane of one service. The client may ask any of
	// them. Each has a host and may have a port and a path, and nothing else. None: those
	// in $CEDARPOST_API_URL, separated by commas, or http://127.0.0.1:8080. Each question
	// carries the key, so plain http is for loopback alone, unless AllowPlaintext is set.
	Servers        []string
	AllowPlaintext bool

	// TokenFile holds the API key. The client reads it again when it changes; if it then
	// holds no API key, the last key stays in use. A file to which users other than its
	// owner and its group have rights is refused. Token is the key itself. Neither:
	// $CEDARPOST_TOKEN_FILE, then $CEDARPOST_TOKEN. White space around a key is ignored;
	// a key with any character in it that is not visible ASCII is refused.
	TokenFile, Token string
	// TokenSource replaces both, for example by access tokens of an issuer. See
	// [NewClientCredentials].
	TokenSource TokenSource

	// CAFile has the CAs to trust in PEM, in place of those of the system.
	// ClientCertFile and ClientKeyFile have a client certificate, with its intermediate
	// certificates after it, and its key, which other users may not read. The client reads
	// the files again when they change, and makes new connections then; if the new ones
	// cannot be used, the last ones stay in use. None: $CEDARPOST_CA, $CEDARPOST_CLIENT_CERT
	// and $CEDARPOST_CLIENT_KEY. They cannot be combined with an HTTPClient.
	CAFile, ClientCertFile, ClientKeyFile string

	// Timeout bounds one call, all its attempts together. 0: 1 s.
	Timeout time.Duration

	// MaxStaleness bounds how old an answer from the cache can be: the answer takes into
	// account every change that was committed more than this before. 0:
	// [DefaultMaxStaleness]. It also bounds for how long a revoked right can be used while
	// the connection is lost. While it works, the client learns of a change within
	// milliseconds.
	MaxStaleness time.Duration
	// CacheBytes is about how much memory kept answers may take. 0: 32 MiB. Negative: none
	// are kept. In addition, uses that wait to be reported take up to 16 MiB: the ids and
	// counts of about 50,000 answers, not the answers. While they take that much, for
	// example when reports fail for long, no answer is reused: each check goes to the
	// service.
	CacheBytes int64
	// MaxAge bounds how long an answer is kept, if that is less than what the service
	// allows. 0: as long as the service allows.
	MaxAge time.Duration
	// Coarse drops all answers at any change, not only the answers that depend on it. Use
	// it to find out whether the finer way causes a problem.
	Coarse bool
	// ReportInterval is how often reuse is reported. 0: 5 s. A client that is killed
	// has not reported the uses of its last interval.
	ReportInterval time.Duration

	// Coalesce sends checks that are made at the same time together, so that many checks
	// need fewer calls. A single check does not wait for others.
	Coalesce bool

	// FailOpenTime is for how much time in each hour checks with FailOpen may be let
	// through while the service is away. When it is used up they get [ErrUnavailable],
	// until no check would have failed open for a while: for six seconds, with the default.
	// It counts the seconds in which any check was let through, not the checks: in an
	// outage all checks fail open, so a bound on their number would be reached at once with
	// much traffic, and too late with little. An outage of this length is bridged in full.
	// Unused time is saved, up to this amount, so within one hour checks can fail open for
	// up to twice as long. So an attacker who can disturb the connection to the service
	// cannot switch authorization off for good. 0: 10 minutes. An hour: no bound.
	FailOpenTime time.Duration

	// HTTPClient sends the calls, with TLS of its own. It must not have a timeout, because the watch is one long
	// call. Nil: a client that speaks HTTP/2, and HTTP/1.1 with TLS 1.3, and notices dead
	// connections. It also tells a server at plain http that does not speak HTTP/2 from a
	// broken connection. With another HTTPClient that speaks HTTP/2 alone, checks with
	// FailOpen take such a server for one that is away.
	HTTPClient *http.Client
	// Transports replace Servers, for tests within one process.
	Transports []connect.Transport

	// TracerProvider and MeterProvider are those of OpenTelemetry. Nil: the global ones.
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
	// Log gets problems outside of calls, such as a broken watch. Nil: slog.Default.
	Log *slog.Logger

	clock   func() instant // nil: realClock; tests have others
	noPings bool           // for tests on machines too busy to answer pings in time
}

// DefaultMaxStaleness is the MaxStaleness of a client whose [Config] sets none.
const DefaultMaxStaleness = 5 * time.Second

// defaultServer is asked if neither Config nor environment names a server.
const defaultServer = "http://127.0.0.1:8080"

// setDefaults replaces zero values, and returns an error for values that are not valid.
// Only the default of HTTPClient is elsewhere, in dial: it depends on the server.
func (c *Config) setDefaults() error {
	c.Timeout = cmp.Or(c.Timeout, time.Second)
	c.MaxStaleness = cmp.Or(c.MaxStaleness, DefaultMaxStaleness)
	c.CacheBytes = cmp.Or(c.CacheBytes, 32<<20)
	c.ReportInterval = cmp.Or(c.ReportInterval, 5*time.Second)
	c.FailOpenTime = cmp.Or(c.FailOpenTime, 10*time.Minute)
	c.Log = cmp.Or(c.Log, slog.Default())
	if c.clock == nil {
		c.clock = realClock
	}
	if c.TracerProvider == nil {
		c.TracerProvider = otel.GetTracerProvider()
	}
	if c.MeterProvider == nil {
		c.MeterProvider = otel.GetMeterProvider()
	}
	for name, d := range map[string]time.Duration{
		"Timeout": c.Timeout, "MaxStaleness": c.MaxStaleness, "MaxAge": c.MaxAge, "ReportInterval": c.ReportInterval,
		"FailOpenTime": c.FailOpenTime,
	} {
		if d < 0 {
			return fmt.Errorf("cedarpost: %s is negative", name)
		}
	}
	if c.ReportInterval > maxReportInterval {
		return fmt.Errorf("cedarpost: ReportInterval is more than %v", maxReportInterval)
	}
	if c.FailOpenTime > failOpenWindow || c.FailOpenTime < failOpenSlot {
		return fmt.Errorf("cedarpost: FailOpenTime is not between %v and %v", failOpenSlot, failOpenWindow)
	}
	if len(c.Servers) == 0 {
		env := cmp.Or(os.Getenv("CEDARPOST_API_URL"), defaultServer)
		c.Servers = strings.FieldsFunc(env, func(r rune) bool { return r == ',' || r == ' ' })
		if len(c.Servers) == 0 {
			return errors.New("cedarpost: $CEDARPOST_API_URL names no server")
		}
	}
	from := "Token"
	switch {
	case c.TokenSource != nil && c.Token+c.TokenFile != "":
		return errors.New("cedarpost: TokenSource replaces Token and TokenFile; give one of the three")
	case c.TokenSource == nil && c.Token == "" && c.TokenFile == "":
		if c.TokenFile = os.Getenv("CEDARPOST_TOKEN_FILE"); c.TokenFile == "" {
			c.Token, from = os.Getenv("CEDARPOST_TOKEN"), "$CEDARPOST_TOKEN"
		}
	}
	if c.Token != "" {
		var err error
		if c.Token, err = apiKey(c.Token); err != nil {
			return fmt.Errorf("cedarpost: %s: %w", from, err)
		}
	}
	return nil
}

// apiKey removes white space around an API key, and the byte order mark that some editors
// put at the start of a file. The errors do not repeat the key.
func apiKey(text string) (string, error) {
	key := strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(text), "\ufeff"))
	if key == "" {
		return "", errors.New("no API key in it")
	}
	for i := range len(key) {
		if key[i] <= ' ' || key[i] > '~' {
			return "", fmt.Errorf("not an API key: byte %d of %d is not visible ASCII", i+1, len(key))
		}
	}
	return key, nil
}

// maxReportInterval is how old an unreported use may get: docs/audit.md promises it.
const maxReportInterval = 10 * time.Second

// dial makes a client of each server. It sends nothing yet.
func (c *Config) dial() (*servers, error) {
	authenticate, err := c.authenticate()
	if err != nil {
		return nil, err
	}
	if len(c.Transports) > 0 {
		names := make([]string, len(c.Transports))
		for i := range names {
			names[i] = fmt.Sprintf("transport %d", i)
		}
		return newServers(names, c.Transports, authenticate, traced), nil
	}
	if c.HTTPClient != nil && c.CAFile+c.ClientCertFile+c.ClientKeyFile != "" {
		return nil, errors.New("cedarpost: CAFile, ClientCertFile and ClientKeyFile have no effect on an HTTPClient; give it CAs and a certificate itself")
	}
	if c.HTTPClient != nil && c.HTTPClient.Timeout != 0 {
		return nil, errors.New("cedarpost: HTTPClient has a timeout, which would cut the watch; use Timeout")
	}
	var transports []connect.Transport
	var names []string
	secure, err := c.secureClient()
	if err != nil {
		return nil, err
	}
	own := []*http.Client{secure}
	for i, server := range c.Servers {
		u, err := serverurl.Parse(server)
		if err != nil {
			return nil, fmt.Errorf("cedarpost: server %d of %d (%s) %w", i+1, len(c.Servers), serverurl.Redacted(server, c.Servers), err)
		}
		if u.Scheme == "http" && !c.AllowPlaintext && !loopback(u.Hostname()) {
			return nil, fmt.Errorf("cedarpost: server %s would get the API key in the clear; use https, or set AllowPlaintext", u)
		}
		names = append(names, u.String())
		httpClient := secure
		if c.HTTPClient == nil && u.Scheme == "http" {
			httpClient = newHTTPClient(newPlainTransport(u, !c.noPings))
			own = append(own, httpClient)
		}
		transports = append(transports, connecthttp.NewTransport(httpClient, u.String(),
			connecthttp.WithCompressors(), connecthttp.WithReadMaxBytes(maxAnswer)))
	}
	s := newServers(names, transports, authenticate, traced)
	s.close = func() {
		for _, httpClient := range own {
			httpClient.CloseIdleConnections()
		}
	}
	return s, nil
}

// secureClient makes the client for servers with TLS.
func (c *Config) secureClient() (*http.Client, error) {
	if c.HTTPClient != nil {
		return c.HTTPClient, nil
	}
	files := clienttls.Files{CA: c.CAFile, Cert: c.ClientCertFile, Key: c.ClientKeyFile}
	if files.CA == "" {
		files.CA = os.Getenv("CEDARPOST_CA")
	}
	if files.Cert == "" && files.Key == "" {
		files.Cert, files.Key = os.Getenv("CEDARPOST_CLIENT_CERT"), os.Getenv("CEDARPOST_CLIENT_KEY")
	}
	transport, err := clienttls.New(files, func(config *tls.Config) *http.Transport {
		t := newTransport(true, !c.noPings)
		t.TLSClientConfig = config
		return t
	}, func(err error) { c.Log.Warn("new files of TLS not taken up, the last ones stay in use", "err", err) })
	if err != nil {
		return nil, fmt.Errorf("cedarpost: %w", err)
	}
	return newHTTPClient(transport), nil
}

// loopback says whether a host is this machine. Capitals and a final dot make no
// difference in a name.
func loopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") || err == nil && addr.IsLoopback()
}

// maxAnswer bounds one message from a server. It is far more than any answer has.
const maxAnswer = 64 << 20

// newTransport makes a transport that speaks HTTP/2. With TLS, a proxy can negotiate
// HTTP/1.1 instead; without TLS there is no negotiation.
func newTransport(secure, pings bool) *http.Transport {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(secure)
	protocols.SetHTTP2(secure)
	protocols.SetUnencryptedHTTP2(!secure)
	t := &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
		TLSHandshakeTimeout: 2 * time.Second,
		IdleConnTimeout:     90 * time.Second,
		Protocols:           protocols,
	}
	if pings {
		// A ping without an answer shows that a connection is dead.
		t.HTTP2 = &http.HTTP2Config{SendPingTimeout: 2 * time.Second, PingTimeout: time.Second, WriteByteTimeout: 2 * time.Second}
	}
	return t
}

func newHTTPClient(transport http.RoundTripper) *http.Client {
	return &http.Client{
		Transport: transport,
		// Do not follow redirects: the key must not reach another server.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// maxTraceState bounds the tracestate that is passed on. W3C asks for at least 512
// characters (https://www.w3.org/TR/trace-context/#tracestate-limits). A tracestate can be
// a user's: a longer one can make the headers too large to be sent, and that looks as if
// the service were away.
const maxTraceState = 512

// traced sends the trace of the call's context.
func traced(next connect.ClientFunc) connect.ClientFunc {
	return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
		if info, ok := connect.CallInfoForClientContext(ctx); ok && trace.SpanContextFromContext(ctx).IsValid() {
			carrier := propagation.MapCarrier{}
			propagation.TraceContext{}.Inject(ctx, carrier)
			if len(carrier["tracestate"]) > maxTraceState {
				delete(carrier, "tracestate")
			}
			for name, value := range carrier {
				info.RequestHeader().Set(name, value)
			}
		}
		return next(ctx, spec)
	}
}

// secretFile is the file of a key, which can be replaced while the client runs.
type secretFile struct {
	name string
	log  *slog.Logger

	mu      sync.Mutex
	secret  string
	changed time.Time // modification time of the file when secret was read
	looked  time.Time // when the file was last checked
}

const secretInterval = time.Second // between two checks of the file

func (f *secretFile) read() error {
	info, err := os.Stat(f.name)
	if err != nil {
		return fmt.Errorf("cedarpost: API key: %w", err)
	}
	if info.ModTime().Equal(f.changed) {
		return nil
	}
	text, err := keyfile.Read(f.name)
	if err != nil {
		return fmt.Errorf("cedarpost: API key: %w", err)
	}
	secret, err := apiKey(string(text))
	if err != nil {
		return fmt.Errorf("cedarpost: %s: %w", f.name, err)
	}
	f.secret, f.changed = secret, info.ModTime()
	return nil
}

// value returns the key. If the file cannot be read, the old key stays in use.
func (f *secretFile) value() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.looked) > secretInterval {
		f.looked = now
		if err := f.read(); err != nil {
			f.log.Warn("API key not read again", "err", err)
		}
	}
	return f.secret
}
