package provider

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

var good = kmsclient.KeyInfo{State: "Enabled", Usable: true, Rotation: kmsclient.On, DeletionProtection: kmsclient.On}

func TestKeyWarnings(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, c := range map[string]struct {
		change   func(*kmsclient.KeyInfo)
		late     time.Time
		recovery bool
		want     []string
	}{
		"all is well": {recovery: true},
		"disabled":    {change: func(i *kmsclient.KeyInfo) { i.State, i.Usable = "Disabled", false }, recovery: true, want: []string{"state"}},
		"will be deleted": {change: func(i *kmsclient.KeyInfo) {
			i.State, i.Usable = "PendingDeletion", false
			i.DeleteAt = now.Add(time.Hour)
		}, recovery: true, want: []string{"state", "deletion"}},
		"material ends":           {change: func(i *kmsclient.KeyInfo) { i.MaterialExpiresAt = now.Add(29 * 24 * time.Hour) }, recovery: true, want: []string{"material_expiry"}},
		"material ends next year": {change: func(i *kmsclient.KeyInfo) { i.MaterialExpiresAt = now.Add(365 * 24 * time.Hour) }, recovery: true},
		"unprotected":             {change: func(i *kmsclient.KeyInfo) { i.DeletionProtection = kmsclient.Off }, recovery: true, want: []string{"deletion_protection_off"}},
		"not rotated":             {change: func(i *kmsclient.KeyInfo) { i.Rotation = kmsclient.Off }, recovery: true, want: []string{"rotation_off"}},
		"imported, not rotated":   {change: func(i *kmsclient.KeyInfo) { i.Rotation = kmsclient.Unsupported }, recovery: true},
		"alone":                   {want: []string{"no_recovery_key"}},
		"credentials end":         {recovery: true, late: now.Add(time.Minute), want: []string{"credentials_expire"}},
	} {
		info := good
		if c.change != nil {
			c.change(&info)
		}
		var kinds []string
		for _, w := range Warnings(&info, c.late, c.recovery, now) {
			kinds = append(kinds, w.Kind)
		}
		if !slices.Equal(kinds, c.want) {
			t.Errorf("%s: warned of %q, want %q", name, kinds, c.want)
		}
	}
}

// TestKeyWatchLogsOnce: a warning when it comes, a line when it goes, nothing while it lasts or
// while the KMS does not answer.
func TestKeyWatchLogsOnce(t *testing.T) {
	var log bytes.Buffer
	info, fail := good, error(nil)
	w := NewWatch(WatchConfig{
		Provider: "ack", Recovery: func() bool { return true }, Late: new(Provider).LateCredentials, Logger: slog.New(slog.NewTextHandler(&log, nil)),
		Describe: func(context.Context) (*kmsclient.KeyInfo, error) {
			i := info
			return &i, fail
		},
	})
	lines := func() []string {
		defer log.Reset()
		return strings.Split(strings.TrimSpace(log.String()), "\n")
	}
	w.update(t.Context())
	if got := lines(); got[0] != "" {
		t.Errorf("logged %q of a good key", got)
	}
	info.DeletionProtection = kmsclient.Off
	for range 3 {
		w.update(t.Context())
	}
	if got := lines(); len(got) != 1 || !strings.Contains(got[0], "deletion_protection_off") || !strings.Contains(got[0], "level=WARN") {
		t.Errorf("logged %q", got)
	}
	fail = errors.New("silent")
	w.update(t.Context())
	if got := lines(); got[0] != "" {
		t.Errorf("a silent KMS: logged %q", got)
	}
	info, fail = good, nil
	w.update(t.Context())
	if got := lines(); len(got) != 1 || !strings.Contains(got[0], "is over") {
		t.Errorf("logged %q", got)
	}
}

// TestKeyWatchFollowsTheContact: when contacts turn bad, or credentials become late, the key is
// looked at at once, and not in ten minutes.
func TestKeyWatchFollowsTheContact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var healthy atomic.Bool
		healthy.Store(true)
		var looks atomic.Int64
		var late atomic.Pointer[time.Time]
		late.Store(new(time.Time))
		w := NewWatch(WatchConfig{
			Provider: "ack", Recovery: func() bool { return true }, Healthy: healthy.Load, Logger: slog.New(slog.DiscardHandler),
			Late:     func() time.Time { return *late.Load() },
			Describe: func(context.Context) (*kmsclient.KeyInfo, error) { looks.Add(1); return &good, nil },
		})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { w.Run(ctx); close(ended) }()
		time.Sleep(describeInterval / 2)
		if n := looks.Load(); n != 1 {
			t.Errorf("%d looks in half of the interval", n)
		}
		healthy.Store(false)
		time.Sleep(2 * stateCheck)
		if n := looks.Load(); n != 2 {
			t.Errorf("%d looks after contacts turned bad", n)
		}
		time.Sleep(2 * describeInterval)
		if n := looks.Load(); n < 3 || n > 5 {
			t.Errorf("%d looks after two intervals", n)
		}
		before, end := looks.Load(), time.Now()
		for _, end := range []*time.Time{&end, {}} {
			late.Store(end)
			time.Sleep(2 * stateCheck)
		}
		if n := looks.Load(); n < before+2 {
			t.Errorf("%d looks after credentials were late, and no longer", n-before)
		}
		stop()
		<-ended
	})
}

// TestKeyIDFlapsIsWarnedOf for an hour after the KMS last went back.
func TestKeyIDFlapsIsWarnedOf(t *testing.T) {
	for ago, want := range map[time.Duration]bool{time.Minute: true, 2 * time.Hour: false} {
		w := NewWatch(WatchConfig{
			Provider: "p", Late: func() time.Time { return time.Time{} }, Recovery: func() bool { return true },
			Flapped: func() time.Time { return time.Now().Add(-ago) },
		})
		if ws := w.warnings(); len(ws) == 1 != want || want && ws[0].Kind != "key_id_flaps" {
			t.Errorf("%v after: %v", ago, ws)
		}
	}
}
