package cedarpost

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"

	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/sdk/go/egress"
)

// A TokenSource returns what a client authenticates with: an API key or an access token. It is
// safe for concurrent use.
//
// Token is called for each call to the service, so it returns at once while it has a valid token.
// If it returns an error, the call is not made: a check gets [ErrNoToken], and never fails open. The
// error must have no secret in it.
type TokenSource interface {
	Token(ctx context.Context) (string, error)
}

type staticToken string

func (s staticToken) Token(context.Context) (string, error) { return string(s), nil }

// StaticToken returns a source of one API key or access token, which does not change. White space
// around it is ignored.
func StaticToken(token string) (TokenSource, error) {
	token, err := apiKey(token)
	if err != nil {
		return nil, fmt.Errorf("cedarpost: StaticToken: %w", err)
	}
	return staticToken(token), nil
}

type fileToken struct{ file *secretFile }

func (f fileToken) Token(context.Context) (string, error) { return f.file.value(), nil }

// FileToken returns a source of the API key or access token in a file. The file is read again
// within a second after it changes; if it then holds none, the last one stays in use, and the log
// says so. A file to which users other than its owner and its group have rights is refused. A nil
// log is slog.Default.
func FileToken(file string, log *slog.Logger) (TokenSource, error) {
	f := &secretFile{name: file, log: cmp.Or(log, slog.Default())}
	if err := f.read(); err != nil {
		return nil, err
	}
	return fileToken{f}, nil
}

// ClientCredentials says how to get access tokens of an OpenID or OAuth issuer with the id and the
// secret of a client (RFC 6749, section 4.4).
type ClientCredentials struct {
	// TokenURL is the token endpoint of the issuer: https, or http on a loopback address.
	TokenURL string
	// ClientID is the id of the client.
	ClientID string
	// SecretFile holds the client's secret. It is read for each token, so the secret can be
	// replaced. A file to which users other than its owner and its group have rights is refused.
	SecretFile string
	// Secret is the secret itself, if there is no SecretFile.
	Secret string
	// Scopes are sent as scope, if there are any.
	Scopes []string
	// Audience is sent as audience, if it is not empty. Some issuers need it; others take the
	// audience of a token from the scopes or from the client.
	Audience string
	// CAFile is a PEM file with authorities that are trusted for the issuer, besides the system's.
	CAFile string
	// Timeout bounds a request to the issuer. 0: 10 s.
	Timeout time.Duration
}

const (
	// tokenMargin is how long before its end a token is no longer used, because a call takes time
	// and clocks differ; for a token that lives shortly, a tenth of its life.
	tokenMargin = 10 * time.Second
	// tokenLife is how long a token is used whose issuer does not say how long it lives.
	tokenLife = time.Minute
	// tokenRetry is the time between two requests to an issuer that gives no token.
	tokenRetry = time.Second
)

// credentials is a source of tokens by client credentials. It asks for the next token when four
// fifths of the life of the last one are over, and calls go on with the last one meanwhile.
type credentials struct {
	config ClientCredentials
	client *egress.Client

	mu       sync.Mutex
	token    string
	renew    time.Time // when the next one is asked for
	end      time.Time // when token is no longer used
	asked    time.Time // when the newest request ended that failed
	err      error     // of that request
	fetching chan struct{}
}

// NewClientCredentials returns a source of access tokens by client credentials. It gets no token
// yet. The calls that need the first token wait for it.
func NewClientCredentials(c ClientCredentials) (TokenSource, error) {
	u, err := url.Parse(c.TokenURL)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" || u.Scheme != "https" && !(u.Scheme == "http" && loopback(u.Hostname())) {
		return nil, errors.New("cedarpost: ClientCredentials: TokenURL must be a URL with https (http is for loopback addresses), without user name and fragment")
	}
	switch {
	case c.ClientID == "":
		return nil, errors.New("cedarpost: ClientCredentials: ClientID is missing")
	case (c.Secret == "") == (c.SecretFile == ""):
		return nil, errors.New("cedarpost: ClientCredentials: give one of SecretFile and Secret")
	}
	host := u.Host
	if u.Port() == "" && u.Scheme == "http" {
		host += ":80"
	}
	client, err := egress.New(egress.Config{OperatorHosts: []string{host}, CAFile: c.CAFile, Timeout: c.Timeout})
	if err != nil {
		return nil, fmt.Errorf("cedarpost: ClientCredentials: %w", err)
	}
	s := &credentials{config: c, client: client}
	if _, err := s.secret(); err != nil {
		return nil, fmt.Errorf("cedarpost: ClientCredentials: %w", err)
	}
	return s, nil
}

func (s *credentials) secret() (string, error) {
	if s.config.SecretFile == "" {
		return s.config.Secret, nil
	}
	text, err := keyfile.Read(s.config.SecretFile)
	if err != nil {
		return "", err
	}
	secret := strings.TrimSpace(string(text))
	if secret == "" {
		return "", fmt.Errorf("%s: no secret in it", s.config.SecretFile)
	}
	return secret, nil
}

// Token returns a token that is valid for a while. It waits only if there is none.
func (s *credentials) Token(ctx context.Context) (string, error) {
	s.mu.Lock()
	now := time.Now()
	if s.fetching == nil && now.After(s.renew) && (s.err == nil || now.Sub(s.asked) >= tokenRetry) {
		s.start()
	}
	if now.Before(s.end) {
		defer s.mu.Unlock()
		return s.token, nil
	}
	wait := s.fetching
	if wait == nil {
		defer s.mu.Unlock()
		return "", s.err
	}
	s.mu.Unlock()
	select {
	case <-wait:
	case <-ctx.Done():
		return "", fmt.Errorf("the issuer has not answered yet: %w", ctx.Err())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return "", s.err
	}
	return s.token, nil
}

// start asks for a token. The request outlives the call that needs it first, so that the next call
// has its outcome; the client bounds its time. Call it with mu held.
func (s *credentials) start() {
	done := make(chan struct{})
	s.fetching = done
	go func() {
		began := time.Now()
		token, life, err := s.fetch()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.fetching, s.err = nil, err
		close(done)
		if err != nil {
			s.asked = time.Now()
			return
		}
		s.token = token
		s.renew = began.Add(life * 4 / 5)
		s.end = began.Add(life - min(tokenMargin, life/10))
	}()
}

// fetch gets a token, and how long it lives. Errors have nothing of what the issuer answered but the
// code of its error: a text in the answer could repeat the secret.
func (s *credentials) fetch() (string, time.Duration, error) {
	secret, err := s.secret()
	if err != nil {
		return "", 0, err
	}
	config := clientcredentials.Config{ClientID: s.config.ClientID, ClientSecret: secret, TokenURL: s.config.TokenURL, Scopes: s.config.Scopes}
	if s.config.Audience != "" {
		config.EndpointParams = url.Values{"audience": {s.config.Audience}}
	}
	defer s.client.Close() // the next request is long after
	began := time.Now()
	answer, err := config.Token(context.WithValue(context.Background(), oauth2.HTTPClient, s.client.HTTP()))
	if refused, ok := errors.AsType[*oauth2.RetrieveError](err); ok {
		code := refused.ErrorCode
		if code == "" && refused.Response != nil {
			code = refused.Response.Status
		}
		return "", 0, fmt.Errorf("the issuer gives no token: %.100q", code)
	}
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		err = wrapped.Err // without the URL
	}
	if err != nil {
		return "", 0, fmt.Errorf("the issuer was not asked: %w", err)
	}
	if kind := answer.Type(); !strings.EqualFold(kind, "bearer") {
		return "", 0, fmt.Errorf("the issuer gives a token of the type %.40q, which is not bearer", kind)
	}
	token, err := apiKey(answer.AccessToken)
	if err != nil {
		return "", 0, errors.New("the issuer gives no token that can be sent")
	}
	life := tokenLife
	if !answer.Expiry.IsZero() {
		life = answer.Expiry.Sub(began)
	}
	if life < time.Second {
		return "", 0, errors.New("the issuer gives a token that has ended already")
	}
	return token, life, nil
}

// tokenSource returns the source that the configuration says.
func (c *Config) tokenSource() (TokenSource, error) {
	switch {
	case c.TokenSource != nil:
		return c.TokenSource, nil
	case c.TokenFile != "":
		return FileToken(c.TokenFile, c.Log)
	}
	return staticToken(c.Token), nil
}

// authenticate makes an interceptor that sends the key or token with each call.
func (c *Config) authenticate() (connect.ClientInterceptor, error) {
	source, err := c.tokenSource()
	if err != nil {
		return nil, err
	}
	return func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			token, err := source.Token(ctx)
			if err != nil {
				return nil, connect.NewError(connect.CodeUnauthenticated, err.Error()).WithCause(fmt.Errorf("%w: %w", ErrNoToken, err))
			}
			if info, ok := connect.CallInfoForClientContext(ctx); ok && token != "" {
				info.RequestHeader().Set("Authorization", "Bearer "+token)
			}
			return next(ctx, spec)
		}
	}, nil
}
