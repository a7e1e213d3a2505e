package access

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.yaml.in/yaml/v4"

	"github.com/cedarpost/cedarpost/internal/days"
)

// An Issuer says whose access tokens are accepted, and what their callers may do. [ReadIssuers]
// reads it from YAML and fills in the defaults.
type Issuer struct {
	// Name is a short name. Names of callers have it: token:<Name>/<claim>. If it changes, its
	// callers become others.
	Name string
	// URL is the issuer as it stands in the claim iss, to the letter.
	URL string
	// Audience must be in the claim aud of the token of a caller. Empty: no token of this issuer
	// authenticates a caller.
	Audience string
	// PrincipalAudiences are the audiences of end users' tokens that name the principal of a question:
	// one must be in the claim aud. Empty: no token of this issuer names a principal.
	PrincipalAudiences []string
	// KeysURL is the URL of the issuer's key set (RFC 7517). Empty: where the issuer's metadata
	// say, at URL/.well-known/openid-configuration (OpenID Connect Discovery 1.0, section 4).
	KeysURL string
	// Hosts are further hosts, each with a port or without, from which keys may be fetched, besides
	// those of URL and KeysURL.
	Hosts []string
	// CAFile is a PEM file with authorities that are trusted for these hosts, besides the system's.
	CAFile string
	// Algorithms are the JWS algorithms that are accepted.
	Algorithms []string
	// AccessTokensOnly refuses tokens whose type is not at+jwt (RFC 9068, section 2.1). Without it
	// the type JWT, or none, is accepted, too, because most issuers send no other.
	AccessTokensOnly bool
	// MaxAge is how long after the claim iat a token is accepted at most, whatever its exp says.
	MaxAge time.Duration
	// Leeway is how much the clocks of the issuer and of this machine may differ.
	Leeway time.Duration
	// CallerClaim is the claim that becomes the caller's name. It must be stable and unique for
	// the issuer. If it is email, the claim email_verified must be true. A value that begins with a
	// slash is a JSON pointer (RFC 6901).
	CallerClaim string
	// GroupsClaim is the claim that lists groups: a text or an array of texts. It can be a JSON
	// pointer, too, such as /realm_access/roles.
	GroupsClaim string
	// Grants says what the members of each group may do.
	Grants map[string][]TokenGrant
}

// A TokenGrant is a role for a bundle, or for all bundles but the special ones ("*").
type TokenGrant struct {
	Role   string `yaml:"role"`
	Bundle string `yaml:"bundle"`
}

const (
	defaultMaxAge   = 2 * time.Hour
	largestMaxAge   = 24 * time.Hour
	defaultLeeway   = 30 * time.Second
	largestLeeway   = 2 * time.Minute
	maxIssuers      = 100
	maxIssuersBytes = 1 << 20
	maxAudiences    = 100
)

var (
	defaultAlgorithms = []string{string(jose.RS256), string(jose.PS256), string(jose.ES256), string(jose.EdDSA)}
	// allAlgorithms are the ones that can be configured: signatures with a public key. "none" and
	// HMAC are not among them, and cannot be.
	allAlgorithms = []string{
		string(jose.RS256), string(jose.RS384), string(jose.RS512), string(jose.PS256), string(jose.PS384), string(jose.PS512),
		string(jose.ES256), string(jose.ES384), string(jose.ES512), string(jose.EdDSA),
	}
	issuerName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)
)

// issuersFile is the file of the issuers.
type issuersFile struct {
	Issuers []issuerEntry `yaml:"issuers"`
}

// issuerEntry is an issuer in the file.
type issuerEntry struct {
	Name               string                  `yaml:"name"`
	Issuer             string                  `yaml:"issuer"`
	Audience           string                  `yaml:"audience"`
	PrincipalAudiences []string                `yaml:"principal_audiences"`
	KeysURL            string                  `yaml:"jwks_uri"`
	Hosts              []string                `yaml:"hosts"`
	CAFile             string                  `yaml:"ca_file"`
	Algorithms         []string                `yaml:"algorithms"`
	AccessTokensOnly   bool                    `yaml:"access_tokens_only"`
	MaxAge             *fileDuration           `yaml:"max_age"`
	Leeway             *fileDuration           `yaml:"leeway"`
	CallerClaim        string                  `yaml:"caller_claim"`
	GroupsClaim        string                  `yaml:"groups_claim"`
	Grants             map[string][]TokenGrant `yaml:"grants"`
}

// fileDuration is a duration in the file, as in all settings.
type fileDuration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *fileDuration) UnmarshalText(text []byte) error {
	parsed, err := days.Parse(string(text))
	*d = fileDuration(parsed)
	return err
}

// unknownKey is what the YAML library says of a key that a struct does not have.
var unknownKey = regexp.MustCompile(`field (.+) not found in type \S*?\.?(issuersFile|issuerEntry|TokenGrant)\b`)

// readable returns an error of the YAML library without the names of Go types.
func readable(err error) string {
	return unknownKey.ReplaceAllStringFunc(err.Error(), func(text string) string {
		m := unknownKey.FindStringSubmatch(text)
		t := map[string]reflect.Type{
			"issuersFile": reflect.TypeFor[issuersFile](), "issuerEntry": reflect.TypeFor[issuerEntry](), "TokenGrant": reflect.TypeFor[TokenGrant](),
		}[m[2]]
		var known []string
		for f := range t.Fields() {
			known = append(known, f.Tag.Get("yaml"))
		}
		return fmt.Sprintf("unknown key %q; known are %s", m[1], strings.Join(known, ", "))
	})
}

// ReadIssuers reads a YAML file like
//
//	issuers:
//	  - name: staff
//	    issuer: https://login.example.org/realms/staff
//	    audience: cedarpost
//	    groups_claim: groups
//	    grants:
//	      cedarpost-operators: [{role: operator, bundle: "*"}]
//
// and fills in the defaults. Members that it does not know, and values that are not valid, are
// errors that name the issuer.
func ReadIssuers(text []byte) ([]Issuer, error) {
	if len(text) > maxIssuersBytes {
		return nil, fmt.Errorf("the file has more than %d bytes", maxIssuersBytes)
	}
	loader, err := yaml.NewLoader(bytes.NewReader(text), yaml.WithV4Defaults(), yaml.WithKnownFields(true))
	if err != nil {
		return nil, err
	}
	var file issuersFile
	if err := loader.Load(&file); errors.Is(err, io.EOF) {
		return nil, errors.New("the file is empty")
	} else if err != nil {
		return nil, fmt.Errorf("not valid: %s", readable(err))
	}
	if err := loader.Load(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one YAML document")
	}
	if len(file.Issuers) == 0 {
		return nil, errors.New("no issuers: the file needs a list with the name issuers")
	}
	issuers := make([]Issuer, 0, min(len(file.Issuers), maxIssuers+1))
	for _, f := range file.Issuers {
		i := Issuer{
			Name: f.Name, URL: f.Issuer, Audience: f.Audience, PrincipalAudiences: f.PrincipalAudiences, KeysURL: f.KeysURL, Hosts: f.Hosts, CAFile: f.CAFile, Algorithms: f.Algorithms,
			AccessTokensOnly: f.AccessTokensOnly, MaxAge: defaultMaxAge, Leeway: defaultLeeway,
			CallerClaim: cmp.Or(f.CallerClaim, "sub"), GroupsClaim: f.GroupsClaim, Grants: f.Grants,
		}
		if f.MaxAge != nil {
			i.MaxAge = time.Duration(*f.MaxAge)
		}
		if f.Leeway != nil {
			i.Leeway = time.Duration(*f.Leeway)
		}
		if i.Algorithms == nil {
			i.Algorithms = slices.Clone(defaultAlgorithms)
		}
		issuers = append(issuers, i)
	}
	return issuers, checkIssuers(issuers)
}

// checkIssuers returns an error that names the first issuer that is not valid.
func checkIssuers(issuers []Issuer) error {
	if len(issuers) > maxIssuers {
		return fmt.Errorf("more than %d issuers", maxIssuers)
	}
	names, urls := map[string]bool{}, map[string]bool{}
	for n, i := range issuers {
		err := i.check()
		switch {
		case err != nil:
		case names[i.Name]:
			err = errors.New("another issuer has this name")
		case urls[i.URL]:
			err = errors.New("another entry has this issuer")
		}
		if err != nil {
			return fmt.Errorf("issuer %d (%.40q): %w", n+1, i.Name, err)
		}
		names[i.Name], urls[i.URL] = true, true
	}
	return nil
}

func (i *Issuer) check() error {
	switch {
	case !issuerName.MatchString(i.Name):
		return errors.New("name: it must be 1 to 32 of a-z, 0-9 and dash, and start with a letter or digit")
	case i.Audience == "" && len(i.PrincipalAudiences) == 0:
		return errors.New("audience is missing; without it, tokens that were issued for other services would be accepted")
	case i.Audience == "" && (len(i.Grants) > 0 || i.GroupsClaim != ""):
		return errors.New("audience is missing: without it no token authenticates a caller, and groups_claim and grants are for callers")
	case len(i.PrincipalAudiences) > maxAudiences || slices.Contains(i.PrincipalAudiences, ""):
		return fmt.Errorf("principal_audiences: it must be a list of at most %d texts, none of which is empty", maxAudiences)
	case i.MaxAge <= 0 || i.MaxAge > largestMaxAge:
		return fmt.Errorf("max_age: it must be more than 0 and at most %v", largestMaxAge)
	case i.Leeway < 0 || i.Leeway > largestLeeway:
		return fmt.Errorf("leeway: it must be 0s to %v", largestLeeway)
	case len(i.Algorithms) == 0:
		return errors.New("algorithms: the list is empty")
	case i.CallerClaim == "":
		return errors.New("caller_claim is missing")
	case len(i.Grants) > 0 && i.GroupsClaim == "":
		return errors.New("groups_claim is missing, and grants are for groups")
	}
	issuer, err := keyURL(i.URL)
	if err != nil {
		return fmt.Errorf("issuer: %w", err)
	}
	if issuer.RawQuery != "" || issuer.ForceQuery { // OpenID Connect Discovery 1.0, section 3
		return errors.New("issuer: the URL must not have a query")
	}
	if i.KeysURL != "" {
		if _, err := keyURL(i.KeysURL); err != nil {
			return fmt.Errorf("jwks_uri: %w", err)
		}
	}
	for _, a := range i.Algorithms {
		if !slices.Contains(allAlgorithms, a) {
			return fmt.Errorf("algorithms: %.40q is not one of %s", a, strings.Join(allAlgorithms, ", "))
		}
	}
	for group, grants := range i.Grants {
		if group == "" {
			return errors.New("grants: a group without a name")
		}
		for _, g := range grants {
			if g.Role == "" || g.Bundle == "" {
				return fmt.Errorf("grants: group %.100q: each grant needs a role and a bundle", group)
			}
		}
	}
	return nil
}

// keyURL checks a URL from which keys or metadata are fetched: with https, or with http on a loopback
// address, where nobody can listen or interfere.
func keyURL(text string) (*url.URL, error) {
	if text == "" {
		return nil, errors.New("the URL is missing")
	}
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" || strings.HasSuffix(text, "#") {
		return nil, errors.New("it must be a URL with a host, and without user name, password and fragment")
	}
	addr, notAddr := netip.ParseAddr(u.Hostname())
	loopback := u.Hostname() == "localhost" || notAddr == nil && addr.IsLoopback()
	if u.Scheme != "https" && !(u.Scheme == "http" && loopback) {
		return nil, errors.New("the URL must begin with https:// (http:// is for loopback addresses)")
	}
	return u, nil
}

// keyHosts returns the hosts that keys may be fetched from, each with its port.
func (i *Issuer) keyHosts() []string {
	hosts := slices.Clone(i.Hosts)
	for _, text := range []string{i.URL, i.KeysURL} {
		u, err := url.Parse(text)
		if err != nil || text == "" {
			continue
		}
		host := u.Host
		if u.Port() == "" && u.Scheme == "http" {
			host += ":80"
		}
		hosts = append(hosts, host)
	}
	return hosts
}
