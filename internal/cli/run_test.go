package cli

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
)

// newRunning makes an app within the test's own process, where goleak sees what it leaves behind.
func newRunning(t *testing.T, edits ...string) (*app, *reloader) {
	t.Helper()
	return newRunningIn(t, newDir(t), edits...)
}

func newRunningIn(t *testing.T, d dir, edits ...string) (*app, *reloader) {
	t.Helper()
	path := d.config(t, edits...)
	c, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewJSONHandler(&told, &slog.HandlerOptions{Level: slog.LevelDebug}))
	a, err := newApp(c, log, serveOptions{drain: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.close)
	return a, &reloader{path: path, seen: digest(path), inUse: digest(path), app: a, running: c, level: new(slog.LevelVar), log: log}
}

func TestRunEndsWithNothingLeft(t *testing.T) {
	t.Run("signal", func(t *testing.T) {
		a, r := newRunning(t)
		signals := make(chan os.Signal, 2)
		signals <- syscall.SIGHUP
		signals <- syscall.SIGTERM
		if err := a.run(context.Background(), r, signals, time.Second); err != nil {
			t.Error(err)
		}
	})
	t.Run("context", func(t *testing.T) {
		a, r := newRunning(t)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := a.run(ctx, r, nil, time.Second); err != nil {
			t.Error(err)
		}
	})
	t.Run("failure", func(t *testing.T) {
		a, r := newRunning(t)
		if err := a.proxy.Run(canceled()); err != nil {
			t.Fatal(err)
		}
		// A proxy that has run cannot run again, so that run meets a failure at once.
		err := a.run(context.Background(), r, nil, time.Second)
		if err == nil || !strings.Contains(err.Error(), "run before") {
			t.Errorf("err = %v", err)
		}
	})
	t.Run("not run", func(t *testing.T) { newRunning(t) })
}

// TestNoTraceOfAFailedStart: what was bound is let go when something else cannot be.
func TestNoTraceOfAFailedStart(t *testing.T) {
	taken := occupy(t)
	path := newDir(t).config(t, `"127.0.0.1:0"`, taken)
	c, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newApp(c, slog.New(slog.DiscardHandler), serveOptions{drain: time.Second}); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("err = %v, want one about the address", err)
	}
}

func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}
