package access

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/maypok86/otter/v2"

	"github.com/cedarpost/cedarpost/sdk/go/egress"
)

// A Token is an access token that was verified. Do not change its slices: others have them, too.
type Token struct {
	// Issuer is the short name of the issuer.
	Issuer string
	// Subject is the claim sub.
	Subject string
	// Name is the claim that names the caller.
	Name string
	// Groups are those of the caller's groups that have grants.
	Groups []string
	// Grants are the grants of these groups, each once.
	Grants []TokenGrant
	// Expires is when the token is no longer accepted: the leeway for clocks after its exp, or after
	// it has its maximum age.
	Expires time.Time
	// Claims are claims for policies.
	Claims TokenClaims
}

// TokenClaims are claims of an access token about how the subject signed in and what the client
// may do (OpenID Connect Core 1.0, section 2; RFC 9068, section 2.2). A claim that the token does
// not have is empty.
type TokenClaims struct {
	ACR      string    // authentication context class
	AMR      []string  // authentication methods
	AuthTime time.Time // when the subject signed in
	Scope    []string
	ClientID string // the claim client_id, or azp
}

// CallerName returns the name of the caller in the log and in grants: token:<issuer>/<name>. No API
// key and no certificate has such a name.
func (t *Token) CallerName() string { return "token:" + t.Issuer + "/" + t.Name }

// TokenReason says for the log why a token was refused.
type TokenReason string

// The reasons.
const (
	TokenMalformed      TokenReason = "malformed"      // not a signed JWT in the compact form
	TokenTooLarge       TokenReason = "too_large"      // longer than 16 KiB
	TokenHeader         TokenReason = "header"         // a header that is critical, or that brings its own key
	TokenType           TokenReason = "type"           // not the type of an access token
	TokenAlgorithm      TokenReason = "algorithm"      // not one of the issuer's algorithms
	TokenUnknownIssuer  TokenReason = "unknown_issuer" // no configured issuer
	TokenPurpose        TokenReason = "purpose"        // the issuer is not configured for callers, or not for principals
	TokenUnknownKey     TokenReason = "unknown_key"    // no key of the issuer has signed it
	TokenNoKeys         TokenReason = "no_keys"        // the keys of the issuer could not be fetched, or not in time
	TokenExpired        TokenReason = "expired"        // exp has passed
	TokenTooOld         TokenReason = "too_old"        // older than the maximum age
	TokenNotYetValid    TokenReason = "not_yet_valid"  // nbf or iat is in the future
	TokenWrongAudience  TokenReason = "wrong_audience" // aud has no configured audience
	TokenBound          TokenReason = "bound"          // bound to a key of the client (claim cnf), which is not checked
	TokenClaimsNotValid TokenReason = "claims"         // a claim is missing, or not of its type
)

// A TokenError is the error of a token that is not accepted.
type TokenError struct {
	// Reason is for the log.
	Reason TokenReason
	// Issuer is the short name of the configured issuer, if the token names one. The token may be forged.
	Issuer string
}

// Error returns the text for the caller. It has nothing of the token, and says which check failed
// only if the token was genuine once, or if the server could not check anything.
func (e *TokenError) Error() string {
	switch e.Reason {
	case TokenExpired:
		return "the access token has expired; get a new one"
	case TokenTooOld:
		return "the access token is older than this server accepts (max_age of the issuer); get a new one"
	case TokenNoKeys: // it may be genuine, so it is no use to get another one
		return "the keys of the issuer of the access token cannot be fetched now, so it cannot be verified; try again in a minute"
	default:
		return "the access token is not accepted"
	}
}

const (
	maxTokenBytes  = 16 << 10
	maxKeyID       = 256
	maxCallerClaim = 200
	// cachedTokenBytes is how much memory verified tokens may take, about.
	cachedTokenBytes = 16 << 20
)

// LooksLikeToken reports whether a credential is taken for an access token. It has at least two
// dots, as a JWT in the compact form has; API keys that Cedarpost makes have none. A token is
// never looked up as an API key, and an API key is never parsed as a token.
func LooksLikeToken(credential string) bool { return strings.Count(credential, ".") >= 2 }

// TokensConfig is the configuration of [Tokens].
type TokensConfig struct {
	// Issuers are the issuers, as [ReadIssuers] returns them.
	Issuers []Issuer
	// CheckGrant returns an error for a grant that is not possible, such as one of an unknown role.
	// Nil: all are possible.
	CheckGrant func(TokenGrant) error
	// Log gets problems with fetching keys. Nil: slog.Default.
	Log *slog.Logger

	fetchTimeout time.Duration // 0: fetchTimeout; tests on busy machines have another
}

// Tokens verifies access tokens of configured issuers. It is safe for concurrent use.
//
// It fetches the keys of an issuer when a token of this issuer comes, and not more than once in 30
// s. It uses keys for an hour if the issuer does not answer. Only calls wait for a fetch whose
// token no known key has signed.
type Tokens struct {
	log        *slog.Logger
	checkGrant func(TokenGrant) error
	timeout    time.Duration // of a request for keys
	ctx        context.Context
	cancel     context.CancelFunc
	text       []byte // of the file, when it was opened
	ended      sync.WaitGroup

	replacing sync.Mutex
	issuers   atomic.Pointer[map[string]*tokenIssuer] // URL → issuer
	verified  *otter.Cache[verifiedKey, *verifiedToken]
}

// purpose is what a token is used for.
type purpose bool

const (
	forCaller    purpose = false // it authenticates a caller
	forPrincipal purpose = true  // it names the principal of a question
)

// verifiedKey is the key of a verified token in the cache. It has the purpose, because a token that is
// accepted for one purpose may not be accepted for the other.
type verifiedKey struct {
	hash [sha256.Size]byte
	purpose
}

// tokenIssuer is a configured issuer with its keys.
type tokenIssuer struct {
	Issuer
	algorithms []jose.SignatureAlgorithm
	keys       *issuerKeys
}

// verifiedToken is a token whose signature and claims were checked. Only what depends on the time
// and on the issuer's keys is checked again.
type verifiedToken struct {
	token  Token  // of a principal: only Issuer and Expires
	claims claims // of the token of a principal
	issuer *tokenIssuer
	key    *verificationKey
}

// NewTokens returns a verifier. It fetches nothing yet. Close it.
func NewTokens(c TokensConfig) (*Tokens, error) {
	t := &Tokens{log: c.Log, checkGrant: c.CheckGrant, timeout: cmp.Or(c.fetchTimeout, fetchTimeout)}
	if t.log == nil {
		t.log = slog.Default()
	}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.issuers.Store(&map[string]*tokenIssuer{})
	t.verified = otter.Must(&otter.Options[verifiedKey, *verifiedToken]{
		MaximumWeight: cachedTokenBytes,
		Weigher:       func(_ verifiedKey, v *verifiedToken) uint32 { return v.weight() },
	})
	if err := t.Replace(c.Issuers); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// Replace replaces the issuers, or changes nothing and returns an error. An issuer that stays as it
// is keeps its keys.
func (t *Tokens) Replace(issuers []Issuer) error {
	t.replacing.Lock()
	defer t.replacing.Unlock()
	if err := checkIssuers(issuers); err != nil {
		return err
	}
	old := *t.issuers.Load()
	next := make(map[string]*tokenIssuer, len(issuers))
	for n, settings := range issuers {
		if err := t.checkGrants(settings.Grants); err != nil {
			return fmt.Errorf("issuer %d (%.40q): grants: %w", n+1, settings.Name, err)
		}
		if same := old[settings.URL]; same != nil && reflect.DeepEqual(same.Issuer, settings) {
			next[settings.URL] = same
			continue
		}
		client, err := egress.New(egress.Config{OperatorHosts: settings.keyHosts(), CAFile: settings.CAFile, Timeout: t.timeout})
		if err != nil {
			return fmt.Errorf("issuer %d (%.40q): %w", n+1, settings.Name, err)
		}
		i := &tokenIssuer{Issuer: settings}
		for _, a := range settings.Algorithms {
			i.algorithms = append(i.algorithms, jose.SignatureAlgorithm(a))
		}
		i.keys = &issuerKeys{issuer: &i.Issuer, client: client, log: t.log, ctx: t.ctx, ended: &t.ended}
		next[settings.URL] = i
	}
	t.issuers.Store(&next)
	for url, i := range old {
		if next[url] != i {
			i.keys.client.Close()
		}
	}
	return nil
}

func (t *Tokens) checkGrants(groups map[string][]TokenGrant) error {
	if t.checkGrant == nil {
		return nil
	}
	for _, group := range slices.Sorted(maps.Keys(groups)) {
		for _, grant := range groups[group] {
			if err := t.checkGrant(grant); err != nil {
				return fmt.Errorf("group %.100q: %w", group, err)
			}
		}
	}
	return nil
}

// Close ends what runs in the background.
func (t *Tokens) Close() {
	t.cancel()
	t.ended.Wait()
	for _, i := range *t.issuers.Load() {
		i.keys.client.Close()
	}
}

// Verify returns what the token of a caller says, if a configured issuer has signed it for the
// issuer's audience and it is valid at the time now. The error is a [TokenError].
func (t *Tokens) Verify(ctx context.Context, raw string, now time.Time) (Token, error) {
	v, err := t.look(ctx, raw, forCaller, now)
	if err != nil {
		return Token{}, err
	}
	return v.token, nil
}

// look verifies a token, or finds that it was verified before and is still valid.
func (t *Tokens) look(ctx context.Context, raw string, p purpose, now time.Time) (*verifiedToken, error) {
	if len(raw) > maxTokenBytes {
		return nil, &TokenError{Reason: TokenTooLarge}
	}
	key := verifiedKey{sha256.Sum256([]byte(raw)), p}
	if v, ok := t.verified.GetIfPresent(key); ok && t.trusts(v, now) {
		if !now.Before(v.token.Expires) {
			t.verified.Invalidate(key)
			return nil, &TokenError{TokenExpired, v.issuer.Name}
		}
		return v, nil
	}
	v, err := t.verify(ctx, raw, p, now)
	if err != nil {
		return nil, err
	}
	t.verified.Set(key, v)
	return v, nil
}

// trusts reports whether the issuer of a token is still configured as it was, and still publishes the
// key that signed the token.
func (t *Tokens) trusts(v *verifiedToken, now time.Time) bool {
	return (*t.issuers.Load())[v.issuer.URL] == v.issuer && v.issuer.keys.current(now).has(v.key)
}

// accepts reports whether a token that was verified is still valid. A nil Tokens accepts none.
func (t *Tokens) accepts(v *verifiedToken, now time.Time) bool {
	return t != nil && v != nil && now.Before(v.token.Expires) && t.trusts(v, now)
}

// verify reads a token, checks its signature, and then its claims.
func (t *Tokens) verify(ctx context.Context, raw string, p purpose, now time.Time) (*verifiedToken, error) {
	head, claims, reason := parseToken(raw)
	if reason != "" {
		return nil, &TokenError{Reason: reason}
	}
	url, _ := claims.text("iss")
	i := (*t.issuers.Load())[url]
	if i == nil {
		return nil, &TokenError{Reason: TokenUnknownIssuer}
	}
	refuse := func(r TokenReason) (*verifiedToken, error) { return nil, &TokenError{r, i.Name} }
	if len(i.audiences(p)) == 0 {
		return refuse(TokenPurpose)
	}
	if !slices.Contains(i.Algorithms, head.Algorithm) {
		return refuse(TokenAlgorithm)
	}
	switch strings.TrimPrefix(strings.ToLower(head.Type), "application/") {
	case "at+jwt":
	case "jwt", "":
		if i.AccessTokensOnly {
			return refuse(TokenType)
		}
	default:
		return refuse(TokenType)
	}
	signed, err := jose.ParseSignedCompact(raw, i.algorithms)
	if err != nil {
		return refuse(TokenMalformed)
	}
	set := i.keys.current(now)
	key := set.verify(signed, head.KeyID, head.Algorithm)
	if key == nil {
		newer := i.keys.newer(ctx, set, now)
		if newer == nil && (set == nil || ctx.Err() != nil) { // a fetch may be under way
			return refuse(TokenNoKeys)
		}
		if key = newer.verify(signed, head.KeyID, head.Algorithm); key == nil {
			return refuse(TokenUnknownKey)
		}
	}
	v := &verifiedToken{issuer: i, key: key}
	if p == forPrincipal {
		v.token, reason = i.readValid(claims, p, now)
		v.claims = claims
	} else {
		v.token, reason = i.read(claims, now)
	}
	if reason != "" {
		return refuse(reason)
	}
	return v, nil
}

// weight is about how many bytes of memory a kept token takes.
func (v *verifiedToken) weight() uint32 {
	const fixed, each = 500, 40
	n := fixed + len(v.token.Subject) + len(v.token.Name) + len(v.token.Claims.ACR) + len(v.token.Claims.ClientID) + each*len(v.token.Grants)
	for _, list := range [][]string{v.token.Groups, v.token.Claims.AMR, v.token.Claims.Scope} {
		for _, s := range list {
			n += each + len(s)
		}
	}
	for name, value := range v.claims {
		n += 3*each + len(name) + len(value)
	}
	return uint32(n)
}
