package stored

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/store"
)

// ErrCompile is the error of published bundles that do not compile: this server is older
// than the one that published them, or the tables were altered.
var ErrCompile = errors.New("does not compile")

// Source returns a stored bundle in the form that the engine compiles. The store keeps the
// catalogue of fields as JSON of []engine.Field, and bundle.yaml as it was published; the error is that
// of reading them.
func Source(b store.Bundle) (engine.Source, error) {
	src := engine.Source{
		Name: b.Name, SchemaFile: bundle.SchemaName, Schema: b.Schema, FieldsFile: bundle.FieldsName,
		SkipForbidErrors: b.OnForbidError == bundle.Skip, Published: true,
	}
	for _, p := range b.Policies {
		src.Policies = append(src.Policies, engine.PolicyText{File: p.File, Line: p.Line, Text: p.Text})
	}
	if err := json.Unmarshal([]byte(b.Fields), &src.Fields); err != nil {
		return src, fmt.Errorf("bundle %s: catalogue: %w", b.Name, err)
	}
	tokens, err := bundle.ReadPrincipalTokens(b.Manifest)
	if err != nil {
		return src, fmt.Errorf("%w: bundle %s: %w", ErrCompile, b.Name, err)
	}
	src.ManifestFile, src.PrincipalTokens = bundle.ManifestName, offline.PrincipalTokens(tokens)
	src.Exports = offline.Exports(bundle.ReadExports(b.Manifest))
	return src, nil
}

// Compile compiles published bundles together, except admin-local, which decides about the service
// itself. It takes over from previous, which may be nil,
// the bundles that did not change. The error is [ErrCompile] if they do not compile.
func Compile(bundles []store.Bundle, previous *engine.Set) (_ *engine.Set, err error) {
	sources := make([]engine.Source, 0, len(bundles))
	for _, b := range bundles {
		if b.Name == engine.AdminLocal {
			continue
		}
		src, err := Source(b)
		if err != nil {
			return nil, err
		}
		sources = append(sources, src)
	}
	set, findings := engine.Load(sources, previous)
	if set == nil {
		return nil, fmt.Errorf("%w: %s", ErrCompile, findings[0])
	}
	return set, nil
}

// Publication returns a checked bundle in the form that the store publishes: its schema as one text in
// Cedar's schema syntax, its policies as Cedar text, and its files as they are. set is the
// compiled set with the bundle. The caller of Publication adds the fields Caller, At,
// BaseRevision, EntitiesRevision and Recheck.
func Publication(b *bundle.Bundle, set *engine.Set) (store.Publish, error) {
	src := offline.Source(b)
	if len(src.Schemas) > 0 {
		var findings []engine.Finding
		if src.Schema, findings = engine.JoinSchemas(src.Schemas); len(findings) > 0 {
			return store.Publish{}, errors.New(findings[0].String()) // the bundle was checked, so there are none
		}
	}
	fields, err := json.Marshal(src.Fields)
	if err != nil {
		return store.Publish{}, err
	}
	p := store.Publish{Bundle: store.Bundle{
		Name: b.Name, Digest: b.Digest(), Description: b.Description, Owners: b.Owners,
		OnForbidError: b.OnForbidError, Namespaces: set.Namespaces(b.Name),
		Schema: src.Schema, Fields: string(fields),
	}}
	for _, pol := range set.Policies(b.Name) {
		p.Bundle.Policies = append(p.Bundle.Policies, store.Policy{
			Bundle: b.Name, ID: pol.ID, File: pol.File, Line: pol.Line, Text: pol.Text,
		})
	}
	p.Bundle.PolicyCount = int32(len(p.Bundle.Policies))
	for _, f := range b.Files {
		p.Files = append(p.Files, store.File{Path: f.Path, Content: f.Content})
	}
	return p, nil
}
