package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

// Start says what the log records about the start of a server.
type Start struct {
	// Version, Commit and GoVersion are those of the binary.
	Version, Commit, GoVersion string
	// Settings are all settings by name, without secrets. If it is nil, no start is recorded.
	Settings map[string]string
}

// settingsDigest returns the SHA-256 of settings in hexadecimal: of lines with the name and the quoted
// value, in the order of the names.
func settingsDigest(settings map[string]string) string {
	sum := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(sum, "%s %q\n", name, settings[name])
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// maxStartsRead bounds the newest starts of servers of one name that are read to find a whole one: a
// row of the log can be damaged.
const maxStartsRead = 10

// recordStart records that this server starts, and what is different from the start before of a server
// with its name. If it cannot be recorded, the server does not start.
func (s *Server) recordStart(ctx context.Context) error {
	start := s.cfg.Start
	if start.Settings == nil {
		return nil
	}
	rows, err := s.cfg.DB.QueryEvents(ctx, store.EventQuery{
		Kind: decisionlog.EventKind(cedarpostv1.EventRecord_SERVER_STARTED), Subject: s.cfg.Name, Limit: maxStartsRead,
	})
	if err != nil {
		return err
	}
	now := &cedarpostv1.ServerStarted{
		Version: start.Version, Commit: start.Commit, GoVersion: start.GoVersion,
		Settings: start.Settings, SettingsDigest: settingsDigest(start.Settings),
	}
	for _, row := range rows {
		rec := decisionlog.ReadEvent(row)
		if before := rec.GetServerStarted(); before != nil {
			now.PreviousEventId, now.Differences = rec.GetEventId(), startDifferences(before, now)
			break
		}
	}
	err = s.recorder.RecordEvent(ctx, &cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_SERVER_STARTED, Subject: s.cfg.Name,
		Detail: &cedarpostv1.EventRecord_ServerStarted{ServerStarted: now},
	})
	if err != nil {
		return fmt.Errorf("the start is not recorded: %w", err)
	}
	var changed []string
	for _, d := range now.GetDifferences() {
		changed = append(changed, d.GetName())
	}
	s.cfg.Log.Info("server starts", "version", start.Version, "settings_digest", now.GetSettingsDigest(), "changed", changed)
	return nil
}

// startDifferences lists what is different between two starts, in the order of the names.
func startDifferences(before, now *cedarpostv1.ServerStarted) (list []*cedarpostv1.ServerStarted_Difference) {
	add := func(name, was, is string) {
		if was != is {
			list = append(list, &cedarpostv1.ServerStarted_Difference{Name: name, Before: was, After: is})
		}
	}
	add("version", before.GetVersion(), now.GetVersion())
	add("commit", before.GetCommit(), now.GetCommit())
	add("go_version", before.GetGoVersion(), now.GetGoVersion())
	all := maps.Clone(before.GetSettings())
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, now.GetSettings())
	for _, name := range slices.Sorted(maps.Keys(all)) {
		add(name, before.GetSettings()[name], now.GetSettings()[name])
	}
	slices.SortStableFunc(list, func(a, b *cedarpostv1.ServerStarted_Difference) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return list
}
