package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
)

// newRunning makes a server in the process of the test, where goleak sees what it leaves behind.
func newRunning(t *testing.T, edits ...string) (*Server, *reloader) {
	t.Helper()
	return newRunningIn(t, clitest.NewDir(t), edits...)
}

func newRunningIn(t *testing.T, d clitest.Dir, edits ...string) (*Server, *reloader) {
	t.Helper()
	path := d.Config(t, edits...)
	c, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	level := new(slog.LevelVar)
	level.Set(slog.LevelDebug)
	log := slog.New(slog.NewJSONHandler(&clitest.Told, &slog.HandlerOptions{Level: level}))
	a, err := New(c, path, filewatch.Digest(path), log, level, Options{Drain: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a, a.reloader
}

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if what := clitest.Told.Leak(); what != "" {
			fmt.Fprintln(os.Stderr, "the server has shown", what)
			code = 1
		}
		os.Exit(code)
	}))
}

func TestRunEndsWithNothingLeft(t *testing.T) {
	t.Run("signal", func(t *testing.T) {
		a, _ := newRunning(t)
		signals := make(chan os.Signal, 2)
		signals <- syscall.SIGHUP
		signals <- syscall.SIGTERM
		if err := a.Run(context.Background(), signals); err != nil {
			t.Error(err)
		}
	})
	t.Run("context", func(t *testing.T) {
		a, _ := newRunning(t)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := a.Run(ctx, nil); err != nil {
			t.Error(err)
		}
	})
	t.Run("failure", func(t *testing.T) {
		a, _ := newRunning(t)
		if err := a.proxy.Run(canceled()); err != nil {
			t.Fatal(err)
		}
		// A proxy that has run cannot run again, so that run meets a failure at once.
		err := a.Run(context.Background(), nil)
		if err == nil || !strings.Contains(err.Error(), "run before") {
			t.Errorf("err = %v", err)
		}
	})
	t.Run("not run", func(t *testing.T) { newRunning(t) })
}

// TestNoTraceOfAFailedStart: what was bound is let go when something else cannot be.
func TestNoTraceOfAFailedStart(t *testing.T) {
	taken := clitest.Occupy(t)
	path := clitest.NewDir(t).Config(t, `"127.0.0.1:0"`, taken)
	c, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(c, path, [32]byte{}, slog.New(slog.DiscardHandler), new(slog.LevelVar), Options{Drain: time.Second}); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("err = %v, want one about the address", err)
	}
}

func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}
