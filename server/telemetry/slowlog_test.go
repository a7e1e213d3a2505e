package telemetry

import (
	"errors"
	"log/slog"
	"testing"
)

// A log that nobody reads keeps no attempt to send from being counted, and closing ends.
func TestSlowLogDoesNotStopTelemetry(t *testing.T) {
	t.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://localhost:1")
	entered, release := make(chan struct{}, 1), make(chan struct{})
	defer close(release)
	tel, err := Open(t.Context(), Config{Log: slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
		entered <- struct{}{}
		<-release
		return len(p), nil
	}), nil))})
	if err != nil {
		t.Fatal(err)
	}
	go tel.senders[0].note(errors.New("away"))
	<-entered
	tel.senders[0].note(errors.New("still away")) // is not logged, so it does not wait
	tel.Close()
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
