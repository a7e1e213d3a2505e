package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/cedarpost/cedarpost/internal/serverurl"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

const (
	callTimeout = 10 * time.Second // of a unary call
	dialTimeout = 5 * time.Second

	tokenEnv = "CEDARPOST_TOKEN"
	apiEnv   = "CEDARPOST_API_URL"
	adminEnv = "CEDARPOST_ADMIN_URL"
)

// tokenFlags say where the API key is. The key itself is not a flag, because other users of the
// machine can read the arguments of a process.
type tokenFlags struct {
	TokenFile string `help:"File with the API key (default: the key is in $CEDARPOST_TOKEN, which is for people at a shell: programs should use a file, because child processes inherit the environment)." env:"CEDARPOST_TOKEN_FILE" type:"path" placeholder:"FILE" group:"client"`
}

// apiFlags say where the decision plane is.
type apiFlags struct {
	APIURL string `name:"api-url" help:"URL of the decision plane (default ${default})." env:"CEDARPOST_API_URL" default:"http://127.0.0.1:8080" placeholder:"URL" group:"client"`
	tokenFlags
	clientTLSFlags
}

// adminFlags say where the admin plane is.
type adminFlags struct {
	AdminURL string `name:"admin-url" help:"URL of the admin plane (default ${default})." env:"CEDARPOST_ADMIN_URL" default:"http://127.0.0.1:8081" placeholder:"URL" group:"client"`
	tokenFlags
	clientTLSFlags
}

func (f *apiFlags) dial() (*peer, error) {
	return dial(f.APIURL, apiEnv, f.TokenFile, f.clientTLSFlags)
}

func (f *adminFlags) dial() (*peer, error) {
	return dial(f.AdminURL, adminEnv, f.TokenFile, f.clientTLSFlags)
}

// peer is a plane of a server, with the texts that help a user when a call fails.
type peer struct {
	*connect.Client
	url    string
	urlEnv string // variable that the URL can be set with
	keyIn  string // the variable or file of the key; "" if there is none
	certIn string // the file of the client certificate; "" if there is none
}

func dial(rawURL, urlEnv, tokenFile string, files clientTLSFlags) (*peer, error) {
	u, err := serverurl.Parse(rawURL)
	if err != nil {
		return nil, misuse("the server's URL (%s) %s (see %s)", serverurl.Redacted(rawURL, []string{rawURL}), err, urlEnv)
	}
	p := &peer{url: u.String(), urlEnv: urlEnv, certIn: files.ClientCert}
	token := os.Getenv(tokenEnv)
	if token != "" {
		p.keyIn = tokenEnv
	}
	if tokenFile != "" {
		if token, err = readSecret(tokenFile); err != nil {
			return nil, about("token-file", err)
		}
		p.keyIn = tokenFile
	}
	transport, err := files.transport()
	if err != nil {
		return nil, err
	}
	p.connect(token, transport)
	return p, nil
}

// connect makes the client. It sends nothing.
func (p *peer) connect(token string, transport http.RoundTripper) {
	authenticate := func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			if info, ok := connect.CallInfoForClientContext(ctx); ok && token != "" {
				info.RequestHeader().Set("Authorization", "Bearer "+token)
			}
			return next(ctx, spec)
		}
	}
	client := &http.Client{
		Transport: transport,
		// Redirects are not followed, so that no other server gets the key.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	p.Client = connect.NewClient(connecthttp.NewTransport(client, p.url), authenticate)
}

func (p *peer) authorization() cedarpostv1connect.AuthorizationServiceClient {
	return cedarpostv1connect.NewAuthorizationServiceClient(p.Client)
}

func (p *peer) entities() cedarpostv1connect.EntityServiceClient {
	return cedarpostv1connect.NewEntityServiceClient(p.Client)
}

func (p *peer) policies() cedarpostv1connect.PolicyServiceClient {
	return cedarpostv1connect.NewPolicyServiceClient(p.Client)
}

func (p *peer) audit() cedarpostv1connect.AuditServiceClient {
	return cedarpostv1connect.NewAuditServiceClient(p.Client)
}

func (p *peer) access() cedarpostv1connect.AccessServiceClient {
	return cedarpostv1connect.NewAccessServiceClient(p.Client)
}

// call makes a unary call. Its error says what the user can do.
func call[Req, Res any](ctx context.Context, p *peer, rpc func(context.Context, *Req) (*Res, error), req *Req) (*Res, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := rpc(ctx, req)
	return res, p.explain(err)
}

// explain adds to an error of a call what the user can do about it.
func (p *peer) explain(err error) error {
	var e *connect.Error
	if !errors.As(err, &e) {
		return err
	}
	hint := ""
	switch {
	case e.Code() == connect.CodeInvalidArgument && strings.HasPrefix(e.Message(), "page_token: "):
		return misuse("--after: no such token of a list with these filters; leave it out to begin the list again")
	case e.Code() == connect.CodeUnauthenticated && p.keyIn == "" && p.certIn != "":
		hint = fmt.Sprintf("\nthe client certificate in %s names no caller of %s, and no API key was sent", p.certIn, p.url)
	case e.Code() == connect.CodeUnauthenticated && p.keyIn == "":
		hint = fmt.Sprintf("\nno API key was sent: set %s, or give --token-file", tokenEnv)
	case e.Code() == connect.CodeUnauthenticated:
		hint = fmt.Sprintf("\nthe server at %s does not accept the key or token from %s", p.url, p.keyIn)
	case e.Code() == connect.CodeCanceled && !e.IsRemote():
		return errors.New("interrupted")
	case e.Code() == connect.CodeDeadlineExceeded && !e.IsRemote():
		hint = fmt.Sprintf("\n%s did not answer in time", p.url)
	case untrusted(err):
		hint = "\n--ca can name a file with the CAs to trust, and so can SSL_CERT_FILE"
	case refusesCertificate(err) && p.certIn == "":
		hint = fmt.Sprintf("\n%s wants a client certificate: give --client-cert and --client-key", p.url)
	case refusesCertificate(err):
		hint = fmt.Sprintf("\n%s does not accept the client certificate in %s", p.url, p.certIn)
	case e.Code() == connect.CodeUnavailable && !e.IsRemote():
		hint = fmt.Sprintf("\nis the server running at %s? (%s says where)", p.url, p.urlEnv)
	case e.Code() == connect.CodeUnavailable:
		hint = "\nask again later; `cedarpost health` says whether the server is ready"
	case strings.HasPrefix(p.url, "http://") && !e.IsRemote() && strings.Contains(e.Message(), "400 Bad Request"): // the answer of a port with TLS
		hint = fmt.Sprintf("\nif %s is a port with TLS, give its URL with https:// (%s says where)", p.url, p.urlEnv)
	case e.Code() == connect.CodeUnimplemented || e.Code() == connect.CodeUnknown,
		e.Code() == connect.CodeInternal && !e.IsRemote():
		hint = fmt.Sprintf("\nis %s the right plane of a cedarpost server? (%s says where)", p.url, p.urlEnv)
	}
	return fmt.Errorf("%s: %s%s", e.Code(), e.Message(), hint)
}
