package server

import (
	"context"
	"math"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/cedarpost/cedarpost/internal/pause"
)

// secretsCheck is the time between two looks at the files of secrets.
const secretsCheck = 10 * time.Second

// SecretFile is a file with a secret or a certificate that a setting names.
type SecretFile struct {
	// Setting is the name of the setting, such as "mask-key-file". It is the label of metrics, so
	// it must be one of a few.
	Setting string
	// Path is the name of the file.
	Path string
}

// Age returns how long the file has not changed.
func (f SecretFile) Age(now time.Time) (time.Duration, error) {
	info, err := os.Stat(f.Path)
	if err != nil {
		return 0, err
	}
	return now.Sub(info.ModTime()), nil
}

// rereadSecrets takes up what the files of the mask key and of the audit keys have now, and returns the
// errors by setting. The certificate has a loop of its own, and the file of the database's URL is read
// for each new connection.
func (s *Server) rereadSecrets() map[string]error {
	errs := map[string]error{}
	if err := s.recorder.RereadMaskKey(); err != nil {
		errs["mask-key-file"] = err
	}
	if err := s.signer.RereadKeys(); err != nil {
		errs["audit-key-file"] = err
	}
	return errs
}

// watchSecrets reads the files of secrets again until ctx ends. It logs an error once for each change
// of its text.
func (s *Server) watchSecrets(ctx context.Context) {
	trouble := map[string]string{}
	for {
		if pause.For(ctx, secretsCheck); ctx.Err() != nil {
			return
		}
		errs := s.rereadSecrets()
		for setting, err := range errs {
			if trouble[setting] != err.Error() {
				s.cfg.Log.Error("the file of a secret cannot be used, its content from before stays in use", "setting", setting, "err", err)
			}
			trouble[setting] = err.Error()
		}
		for setting := range trouble {
			if errs[setting] == nil {
				s.cfg.Log.Info("the file of a secret can be used again", "setting", setting)
				delete(trouble, setting)
			}
		}
	}
}

// registerSecretFiles adds the ages of the files of secrets. Of several files of one setting it is the
// oldest that counts.
func registerSecretFiles(r prometheus.Registerer, files []SecretFile, maxAge time.Duration, now func() time.Time) {
	bySetting := map[string][]SecretFile{}
	for _, f := range files {
		bySetting[f.Setting] = append(bySetting[f.Setting], f)
	}
	for setting, files := range bySetting {
		oldest := func() float64 {
			at := math.NaN()
			for _, f := range files {
				info, err := os.Stat(f.Path)
				if err != nil {
					return math.NaN()
				}
				if changed := float64(info.ModTime().UnixMilli()) / 1000; math.IsNaN(at) || changed < at {
					at = changed
				}
			}
			return at
		}
		promauto.With(r).NewGaugeFunc(prometheus.GaugeOpts{Name: "cedarpost_secret_file_timestamp_seconds",
			Help:        "When the file with a secret or a certificate last changed, by setting, as Unix time; of several files the oldest, and NaN if one cannot be found.",
			ConstLabels: prometheus.Labels{"setting": setting}}, oldest)
		promauto.With(r).NewGaugeFunc(prometheus.GaugeOpts{Name: "cedarpost_secret_file_overdue",
			Help:        "1 if the file with a secret or a certificate has not changed for longer than --max-secret-age, by setting. Alert on it.",
			ConstLabels: prometheus.Labels{"setting": setting}}, func() float64 {
			if maxAge > 0 && float64(now().UnixMilli())/1000-oldest() > maxAge.Seconds() { // false for NaN
				return 1
			}
			return 0
		})
	}
}

// ReloadSecrets reads the files of the mask key and of the audit keys again. It logs what changed and
// what cannot be used, which then stays as it was.
func (s *Server) ReloadSecrets() {
	for setting, err := range s.rereadSecrets() {
		s.cfg.Log.Error("secret not reloaded, the one before stays in use", "setting", setting, "err", err)
	}
}
