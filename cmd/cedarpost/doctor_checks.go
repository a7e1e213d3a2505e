package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/telemetry"
	"github.com/cedarpost/cedarpost/store"
)

const (
	doctorTimeout = 30 * time.Second
	// As in the warnings of a server.
	certificateSoon = 14 * 24 * time.Hour
	maxClockSkew    = 2 * time.Second
	signingOverdue  = time.Minute
	witnessOverdue  = time.Hour
)

// checkSettings checks values and combinations of settings.
func (d *doctorCmd) checkSettings(k *kong.Context) (found []diagnosis) {
	for _, r := range d.refusals(k) {
		found = append(found, fail(r.setting, r.mend, r.err))
	}
	for _, plane := range [][2]string{{"listen", d.Listen}, {"admin-listen", d.AdminListen}} {
		setting, addr := plane[0], plane[1]
		if d.TLSCert == "" && d.AllowPlaintext && !onLoopback(addr) {
			found = append(found, warn(setting, "give --tls-cert and --tls-key, unless something else encrypts all of the way", "%s is open to other machines without TLS, because of --allow-plaintext", addr))
		}
	}
	if !onLoopback(d.OpsListen) && (d.Health || d.Metrics) {
		found = append(found, warn("ops-listen", "bind it to a loopback address, or let only the monitoring reach it", "%s is open to other machines, without TLS and without authentication", d.OpsListen))
	}
	if d.AllowPlaintext && d.TLSCert != "" {
		found = append(found, warn("allow-plaintext", "leave it out", "it has no effect, because there is a certificate"))
	}
	if d.Pprof {
		found = append(found, warn("pprof", "leave it out when nobody looks at profiles", "profiles show what is in memory, to all users of this machine"))
	}
	if d.RateLimit == 0 {
		found = append(found, warn("rate-limit", "set the checks per second that one caller needs at most", "no caller is limited"))
	}
	if d.RecordMode == string(auditlog.Buffered) {
		found = append(found, warn("record-mode", "use strict", "a crash loses decisions that were answered"))
	}
	if d.Development {
		found = append(found, warn("development-database", "leave it out in production", "the database is not checked before the server starts"))
	}
	if where := d.passwordOutsideOfFile(k); where != "" && where != "--database-url" {
		found = append(found, warn("database-url", "give the URL with --database-url-file", "a password of the database is in %s", where))
	}
	plaintext, err := telemetry.Check(d.PlainTelemetry)
	if bad, ok := errors.AsType[*telemetry.VariableError](err); ok {
		found = append(found, fail(bad.Name, "correct the variable, or leave it out: docs/operations.md, Telemetry", bad))
	}
	for _, name := range plaintext {
		found = append(found, warn(name, "use a URL with https, unless something else encrypts all of the way", "telemetry goes to another machine without TLS, because of --allow-plaintext-telemetry"))
	}
	if d.PlainTelemetry && err == nil && len(plaintext) == 0 {
		found = append(found, warn("allow-plaintext-telemetry", "leave it out", "it has no effect, because no telemetry goes to another machine without TLS"))
	}
	if d.MaskKeyFile == "" {
		found = append(found, warn("mask-key-file", "make 32 random bytes, the same for every server, for example with: openssl rand -hex 32", "without a key, masked values can be searched for on one server only, until it stops"))
	}
	if len(d.AuditKeyFile)+len(d.AuditAgentKey) == 0 {
		found = append(found, warn("audit-key-file", "make a key with cedarpost audit keygen, or use one of an ssh-agent (--audit-agent)", "this server does not sign the log, so if no other server does, nobody can prove that it is whole"))
	}
	return found
}

// onLoopback reports whether an address is only of this machine.
func onLoopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") || ip != nil && ip.IsLoopback()
}

// checkFiles checks the files that settings name: that they can be used, and their age.
func (d *doctorCmd) checkFiles() (found []diagnosis) {
	now := time.Now()
	limit := time.Duration(d.MaxSecretAge)
	for _, f := range d.secretFiles() {
		age, err := f.Age(now)
		if err == nil && f.Setting != "tls-cert" && f.Setting != "client-ca" { // these are no secrets
			_, err = keyfile.Read(f.Path)
		}
		switch days := int(age.Hours() / 24); {
		case err != nil:
			found = append(found, fail(f.Setting, "correct the path, or the rights of the file", err))
		case limit > 0 && age > limit:
			found = append(found, warn(f.Setting, "renew it: docs/deployment.md, Files with secrets", "%s is %d days old, older than --max-secret-age of %v", f.Path, days, d.MaxSecretAge))
		default:
			found = append(found, pass(f.Setting, "%s, %d days old", f.Path, days))
		}
	}
	failed := func(check string) bool {
		return slices.ContainsFunc(found, func(f diagnosis) bool { return f.Check == check && f.Status == statusFail })
	}
	if d.MaskKeyFile != "" && !failed("mask-key-file") {
		if _, err := decisionlog.ReadMaskKey(d.MaskKeyFile); err != nil {
			found = append(found, fail("mask-key-file", "give a file with 32 bytes in hexadecimal or base64", err))
		}
	}
	if d.TLSCert != "" && d.TLSKey != "" {
		found = append(found, d.checkCertificate(now))
	}
	var err error
	if !failed("client-ca") {
		err = server.CheckClientCertificates(d.clients(), d.TLSCert != "")
	}
	if bad, ok := errors.AsType[*decisionlog.ConfigError](err); ok {
		found = append(found, fail(configFlags[bad.Field], "correct the settings: docs/deployment.md, Client certificates", err))
	} else if err != nil {
		found = append(found, fail("client-ca", "correct the file", err))
	}
	if len(d.AuditKeyFile)+len(d.AuditAgentKey) > 0 {
		if err := decisionlog.TryKeys(d.signing()); err != nil {
			found = append(found, fail("audit keys", "correct the file, or start the ssh-agent and add the key with ssh-add", err))
		} else {
			found = append(found, pass("audit keys", "each key signs"))
		}
	}
	if d.IssuersFile != "" {
		if tokens, err := access.OpenTokens(d.IssuersFile, access.TokensConfig{CheckGrant: access.CheckTokenGrant, Log: slog.New(slog.DiscardHandler)}); err != nil {
			found = append(found, fail("issuers-file", "correct the file: docs/tokens.md", err))
		} else {
			tokens.Close()
			found = append(found, pass("issuers-file", "%s can be used", d.IssuersFile))
		}
	}
	if d.AuditCheckpointFile != "" {
		if err := auditlog.CheckFile(d.AuditCheckpointFile); err != nil {
			found = append(found, fail("audit-checkpoint-file", "give a file that this user may write", err))
		}
	}
	return found
}

// checkCertificate checks the certificate of the server as the server does.
func (d *doctorCmd) checkCertificate(now time.Time) diagnosis {
	const check = "certificate"
	pair, err := tls.LoadX509KeyPair(d.TLSCert, d.TLSKey)
	if err != nil {
		return fail(check, "give a certificate and its own key", err)
	}
	end := pair.Leaf.NotAfter
	unfit := server.CheckServerUse(pair.Leaf)
	switch {
	case unfit != nil:
		return fail(check, "give a certificate that is for servers", fmt.Errorf("%s: %w", d.TLSCert, unfit))
	case now.After(end):
		return fail(check, "renew it", fmt.Errorf("%s has expired at %s", d.TLSCert, end.UTC().Format(time.RFC3339)))
	case now.Before(pair.Leaf.NotBefore):
		return fail(check, "wait, or correct the clock", fmt.Errorf("%s is not valid before %s", d.TLSCert, pair.Leaf.NotBefore.UTC().Format(time.RFC3339)))
	case end.Sub(now) < certificateSoon:
		return warn(check, "renew it", "%s ends at %s", d.TLSCert, end.UTC().Format(time.RFC3339))
	}
	return pass(check, "%s ends at %s", d.TLSCert, end.UTC().Format(time.RFC3339))
}

// checkDatabase checks the database, and what depends on it.
func (d *doctorCmd) checkDatabase(ctx context.Context, k *kong.Context) (found []diagnosis) {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	log := slog.New(slog.DiscardHandler)
	url, err := d.live(k, log)
	if err != nil {
		return []diagnosis{fail("database-url", "give --database-url-file", err)}
	}
	standbys, err := d.urls(log)
	if err == nil {
		err = d.checkTransport(d.urlsFlag(), standbys...)
	}
	if err != nil {
		return []diagnosis{fail("read-database-urls", "correct the setting", err)}
	}
	db, err := store.Open(ctx, d.store(url, standbys))
	if err != nil {
		return []diagnosis{fail("database", "correct the URL or the rights of the login, or run cedarpost migrate", err)}
	}
	defer db.Close()
	found = append(found, pass("database", "it answers, and its schema fits this version"))
	found = append(found, d.checkRoles(ctx, db)...)
	found = append(found, d.checkTime(ctx, db)...)
	found = append(found, d.checkSigning(ctx, db)...)
	return append(found, d.checkCallers(ctx, db)...)
}

// checkRoles checks what the login and other logins of the cluster may do, and the retention.
func (d *doctorCmd) checkRoles(ctx context.Context, db *store.DB) (found []diagnosis) {
	const roles, logins, retention = "database-roles", "database-logins", "decision-retention"
	switch err := db.CheckProduction(ctx); {
	case errors.Is(err, store.ErrUnsafe) && d.Development:
		found = append(found, warn(roles, "serve with a login of its own: cedarpost migrate --print-roles", "%v", err))
	case err != nil:
		found = append(found, fail(roles, "serve with a login of its own: cedarpost migrate --print-roles", err))
	default:
		found = append(found, pass(roles, "the login cannot rewrite the log, and no other login writes"))
	}
	switch exposed, err := db.Exposed(ctx); {
	case err != nil:
		found = append(found, fail(logins, "look at the database", err))
	case len(exposed) > 0:
		found = append(found, warn(logins, "run the statements of: cedarpost migrate --print-roles", "%s", strings.Join(exposed, "; ")))
	default:
		found = append(found, pass(logins, "only Cedarpost's logins may connect"))
	}
	if keep := time.Duration(d.Retention); keep > 0 {
		if least, err := db.MinRetention(ctx); err != nil {
			found = append(found, fail(retention, "look at the database", err))
		} else if keep < least {
			found = append(found, fail(retention, "raise it", fmt.Errorf("the log is to be kept for %.4g days, and the database keeps it for %.4g at least", keep.Hours()/24, least.Hours()/24)))
		}
	}
	return found
}

// checkTime checks the clocks and the partitions of the log.
func (d *doctorCmd) checkTime(ctx context.Context, db *store.DB) (found []diagnosis) {
	const clock, partitions = "clock", "partitions"
	asked := time.Now()
	ready, now, err := db.PartitionsReady(ctx, asked, asked.UTC().AddDate(0, 0, 1))
	if err != nil {
		return []diagnosis{fail(partitions, "look at the database", err)}
	}
	unsure := time.Since(asked) / 2
	if ahead := asked.Add(unsure).Sub(now); ahead.Abs()-unsure > maxClockSkew {
		found = append(found, warn(clock, "repair the time service of the one that is wrong", "this machine is %+.1f s ahead of the database", ahead.Seconds()))
	} else {
		found = append(found, pass(clock, "this machine and the database differ by at most %v", (ahead.Abs()+unsure).Round(time.Millisecond)))
	}
	if ready[0] && ready[1] {
		return append(found, pass(partitions, "the log has partitions for today and tomorrow"))
	}
	return append(found, warn(partitions, "start a server, which makes them; if servers run, look at cedarpost_background_failures_total", "the log has no partition for today or tomorrow"))
}

// checkSigning checks how much of the log is signed, and what the witness has.
func (d *doctorCmd) checkSigning(ctx context.Context, db *store.DB) (found []diagnosis) {
	const signing, witness = "log signing", "witness"
	const mendWitness = "run cedarpost audit witness on another machine, and give doctor its file with --witness-state"
	newest, err := db.LatestCheckpoint(ctx, "")
	if errors.Is(err, store.ErrNotFound) {
		return []diagnosis{
			warn(signing, "start a server with an audit key", "no checkpoint was signed yet"),
			warn(witness, mendWitness, "there is no checkpoint that a witness could have"),
		}
	}
	end := int64(0)
	if err == nil {
		end, err = db.NextLeaf(ctx)
	}
	if err != nil {
		return []diagnosis{fail(signing, "look at the database", err)}
	}
	if age, unsigned := time.Since(newest.At), max(end-newest.Size, 0); unsigned > 0 && age > signingOverdue {
		found = append(found, fail(signing, "see docs/runbook.md, CedarpostLogNotSigned", fmt.Errorf("%d batches wait for a checkpoint, and the newest one is %v old", unsigned, age.Round(time.Second))))
	} else {
		found = append(found, pass(signing, "the newest checkpoint covers %d batches, and %d wait for the next one", newest.Size, unsigned))
	}
	if d.WitnessState == "" {
		return append(found, warn(witness, mendWitness, "it is not known whether a witness keeps checkpoints elsewhere"))
	}
	info, err := os.Stat(d.WitnessState)
	if err != nil {
		return append(found, fail(witness, mendWitness, err))
	}
	kept, err := auditlog.LastCheckpoint(d.WitnessState, newest.Origin, func(auditlog.Checkpoint) bool { return true })
	switch age := time.Since(info.ModTime()).Round(time.Second); {
	case err != nil:
		found = append(found, fail(witness, "give the file of audit witness --state", err))
	case kept.Size == 0:
		found = append(found, fail(witness, mendWitness, fmt.Errorf("%s has no checkpoint of the log %s", d.WitnessState, newest.Origin)))
	case kept.Size < newest.Size && age > witnessOverdue:
		found = append(found, warn(witness, "look whether the witness runs, and copy its file again if this is a copy", "it has %d of %d signed batches, and got its newest checkpoint %v ago", kept.Size, newest.Size, age))
	default:
		found = append(found, pass(witness, "it has a checkpoint of %d of %d signed batches", kept.Size, newest.Size))
	}
	return found
}

// checkCallers checks the API keys and the grants: how many operators are left, keys and grants
// that have ended, and keys that are old.
func (d *doctorCmd) checkCallers(ctx context.Context, db *store.DB) (found []diagnosis) {
	const operators, keys = "operators", "API keys"
	var now store.Access
	err := db.View(ctx, func(v *store.View) (err error) {
		now, err = v.Access(ctx)
		return err
	})
	if err != nil {
		return append(found, fail(keys, "look at the database", err))
	}
	if d.BootstrapKeyFile != "" {
		const setting, mend = "bootstrap-key-file", "remove the file, and leave the setting out"
		switch err := access.CheckBootstrapKey(d.BootstrapKeyFile, now); {
		case errors.Is(err, access.ErrKeyRevoked) && d.someoneCanSignIn(now.Keys):
			found = append(found, warn(setting, mend, "%v", err))
		case errors.Is(err, access.ErrKeyRevoked):
			found = append(found, fail(setting, mend+", and make a key with cedarpost keys recover", err))
		case err != nil:
			found = append(found, fail(setting, "correct the path, or the rights of the file, or leave the setting out", err))
		}
	}
	at := time.Now()
	switch access.OperatorsLeft(now.Keys, now.Grants, at) {
	case 0:
		detail := "no API key has the role operator for all bundles"
		if len(now.Keys) == 0 {
			detail = "the database has no API key"
		}
		found = append(found, warn(operators, d.mendNoKey(len(now.Keys)), "%s", detail))
	case 1:
		found = append(found, warn(operators, "cedarpost keys create or cedarpost grants put, without --expires", "each API key of an operator of all bundles ends at some time"))
	default:
		found = append(found, pass(operators, "an API key without an end has the role operator for all bundles"))
	}
	if access.NeedlessBootstrap(now.Keys, now.Grants, at) {
		found = append(found, warn("first key", "cedarpost keys revoke bootstrap --grants, and remove its file and --bootstrap-key-file", "the key of bootstrap, which has all roles, still lives although another operator has a key"))
	}
	var ended, old []string
	for _, k := range now.Keys {
		if !k.Live(at) {
			ended = append(ended, k.ID+" of "+k.Name)
		} else if limit := time.Duration(d.MaxSecretAge); limit > 0 && at.Sub(k.CreatedAt) > limit {
			old = append(old, k.ID+" of "+k.Name)
		}
	}
	if len(old) > 0 {
		found = append(found, warn(keys, "cedarpost keys rotate CALLER --out FILE, for each, and then cedarpost keys revoke --id ID", "older than %v: %s", d.MaxSecretAge, short(old, "")))
	}
	if len(ended) > 0 {
		found = append(found, warn(keys, "cedarpost keys revoke --id ID, for each", "have ended: %s", short(ended, "")))
	}
	if len(old)+len(ended) == 0 {
		found = append(found, pass(keys, "%s, none too old", count(len(now.Keys), "key", "keys")))
	}
	return found
}
