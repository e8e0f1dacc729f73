package cli

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// checked returns the report of kms check on a plugin, as an object and as text, and the class of
// each call that was made.
func checked(s kmsclient.Service) (providerReport, string, []string) {
	var classes []string
	observe := func(c kmsclient.Call) { classes = append(classes, c.Op+" "+c.Class) }
	r := checkBackend(context.Background(), "p", &provider.Provider{Kind: "plugin", Service: s}, uses{encrypts: true, recovered: true}, observe)
	var text bytes.Buffer
	r.text(&text)
	return r, text.String(), classes
}

// TestKMSCheckOfPlugins: every public plugin that can be used passes, right after its start, and in
// an outage there is a finding and no round trip.
func TestKMSCheckOfPlugins(t *testing.T) {
	for _, p := range kmstest.Personalities() {
		t.Run(p.Name, func(t *testing.T) {
			plugin := kmstest.NewPersona(p)
			r, text, classes := checked(plugin)
			if p.Unusable != "" {
				if r.OK || strings.Contains(text, "round trip") || strings.HasSuffix(strings.Join(classes, "\n"), " ok") {
					t.Errorf("%v\n%s", classes, text)
				}
				return
			}
			if !r.OK || r.RoundTripMS <= 0 || !strings.Contains(text, "round trip") {
				t.Errorf("right after the start: %s", text)
			}
			plugin.SetOutage(true)
			if r, text, _ := checked(plugin); r.OK || strings.Contains(text, "round trip") {
				t.Errorf("in an outage: %s", text)
			}
		})
	}
}

// ailing says of its health what the test wants.
type ailing struct {
	*kmstest.Memory
	health string
}

func (a ailing) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: a.health, KeyID: "memory/1"}, nil
}

// TestKMSCheckShowsThePluginsText: it is quoted, on one line, and has a limit.
func TestKMSCheckShowsThePluginsText(t *testing.T) {
	for health, want := range map[string]string{
		"err":                     `not healthy: "err"`,
		"":                        `not healthy: ""`,
		"a\n- forged\x1b[31m":     `not healthy: "a\n- forged\x1b[31m"`,
		strings.Repeat("é", 1000): `not healthy: "` + strings.Repeat("é", 128) + `"…`,
	} {
		r, text, _ := checked(ailing{kmstest.NewMemory(), health})
		if r.OK || !strings.Contains(text, want) || strings.Count(text, "\n") != 2 {
			t.Errorf("%q: %s", health, text)
		}
	}
}

// numbered has key IDs that are only numbers, as Vault's transit engine has.
type numbered struct{ ailing }

func (numbered) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: "12"}, nil
}

// TestKMSCheckWarnsOfNumbers: a key ID that another key could have is a warning.
func TestKMSCheckWarnsOfNumbers(t *testing.T) {
	const text = "the key ID 12 is only a number"
	if r, _, _ := checked(numbered{ailing{Memory: kmstest.NewMemory()}}); len(r.Warnings) != 1 || !strings.HasPrefix(r.Warnings[0], text) {
		t.Errorf("%q", r.Warnings)
	}
	if r, _, _ := checked(ailing{kmstest.NewMemory(), "ok"}); len(r.Warnings) != 0 {
		t.Errorf("%q", r.Warnings)
	}
}
