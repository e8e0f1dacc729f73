package kmsclient_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestPoller checks again after each pause, sooner when it is woken, and never twice within a
// second.
func TestPoller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var checks []time.Duration
		p := kmsclient.NewPoller(func(context.Context) { checks = append(checks, time.Since(start)) }, func() time.Duration { return time.Minute })
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); p.Run(ctx) }()
		synctest.Wait()
		for range 3 { // one check for all of them, a second after the first one
			p.Wake()
		}
		time.Sleep(90 * time.Second)
		p.Wake()
		synctest.Wait()
		cancel()
		<-ended
		want := []time.Duration{0, time.Second, 61 * time.Second, 90 * time.Second}
		if !slices.Equal(checks, want) {
			t.Errorf("checks at %v, want %v", checks, want)
		}
	})
}

func TestJitter(t *testing.T) {
	for range 1000 {
		if d := kmsclient.Jitter(time.Minute); d > time.Minute || d < 54*time.Second {
			t.Fatal(d)
		}
	}
}

// TestReasons: each reason has a name, and a class that metrics and the audit log know.
func TestReasons(t *testing.T) {
	names := map[string]bool{}
	for r := kmsclient.Unreachable; r <= kmsclient.Prevented; r++ {
		names[r.String()] = true
		want := kmsclient.ClassUnavailable
		switch r {
		case kmsclient.Denied:
			want = kmsclient.ClassDenied
		case kmsclient.KeyDisabled, kmsclient.KeyGone, kmsclient.KeyNotFound, kmsclient.AliasNotFound:
			want = kmsclient.ClassKeyUnusable
		case kmsclient.Invalid:
			want = kmsclient.ClassInvalid
		case kmsclient.BrokenContract:
			want = kmsclient.ClassContract
		}
		if r.Class() != want || r.Gone() && want != kmsclient.ClassKeyUnusable || r.Responded() && want != kmsclient.ClassUnavailable {
			t.Errorf("%v: class %q, gone %v, answered %v", r, r.Class(), r.Gone(), r.Responded())
		}
	}
	if len(names) != 11 || (kmsclient.Prevented+1).String() != "reason(11)" {
		t.Errorf("%v", names)
	}
}
