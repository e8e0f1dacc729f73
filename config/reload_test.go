package config

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestWeakens(t *testing.T) {
	sealed := Rule{Prefix: "/a/", WriteWith: "k", AllowPlaintextReads: true}
	strict := Rule{Prefix: "/a/", WriteWith: "k"}
	plain := Rule{Prefix: "/a/", WriteWith: Plaintext, AllowPlaintextReads: true}
	at := func(prefix string, r Rule) Rule { r.Prefix = prefix; return r }
	const removed = `keys below "/a/" would have no rule: their values were encrypted with "k"`
	tests := map[string]struct {
		running, next []Rule
		want          []string
	}{
		"same":                {[]Rule{sealed}, []Rule{sealed}, nil},
		"first rule":          {nil, []Rule{sealed}, nil},
		"removed":             {[]Rule{sealed}, nil, []string{removed}},
		"plaintext removed":   {[]Rule{plain}, nil, nil},
		"to plaintext":        {[]Rule{sealed}, []Rule{plain}, []string{`keys below "/a/" would be written as plaintext: their values were encrypted with "k"`}},
		"to sealed":           {[]Rule{plain}, []Rule{sealed}, nil},
		"to another provider": {[]Rule{sealed}, []Rule{{Prefix: "/a/", WriteWith: "l", ReadWith: []string{"k"}, AllowPlaintextReads: true}}, nil},
		"another key, old unreadable": {[]Rule{sealed}, []Rule{{Prefix: "/a/", WriteWith: "l", AllowPlaintextReads: true}},
			[]string{`keys below "/a/" would be encrypted with "l": their values are encrypted with "k", which is not in readWith`}},
		"narrowed":                    {[]Rule{sealed}, []Rule{at("/a/b/", sealed)}, []string{removed}},
		"widened":                     {[]Rule{sealed}, []Rule{at("/", sealed)}, nil},
		"widened, hole":               {[]Rule{sealed}, []Rule{at("/", sealed), plain}, []string{`keys below "/a/" would be written as plaintext: their values were encrypted with "k"`}},
		"hole in it":                  {[]Rule{sealed}, []Rule{sealed, at("/a/b/", plain)}, []string{`keys below "/a/b/" would be written as plaintext: their values were encrypted with "k"`}},
		"split":                       {[]Rule{at("", sealed)}, []Rule{at("", sealed), at("/a/", sealed)}, nil},
		"reads back on":               {[]Rule{strict}, []Rule{sealed}, []string{`keys below "/a/" would allow plaintext reads, which are refused now`}},
		"reads off":                   {[]Rule{sealed}, []Rule{strict}, nil},
		"reads back on in a hole":     {[]Rule{strict}, []Rule{strict, at("/a/b", sealed)}, []string{`keys below "/a/b" would allow plaintext reads, which are refused now`}},
		"strict removed below strict": {[]Rule{strict, at("/", strict)}, []Rule{at("/", strict)}, nil},
		"passthrough":                 {[]Rule{sealed}, []Rule{{Prefix: "/a/", WriteWith: "k", AllowPlaintextReads: true, OnUndecryptable: "passthrough"}}, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Weakens(tt.running, tt.next)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestNeedsRestart(t *testing.T) {
	load := func() *Config {
		c, err := Load(write(t, minimal+kmsDev+"admin: {}\n"))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	next := load()
	next.Rules = []Rule{{Prefix: "/", WriteWith: "dev"}}
	next.Log.Level = "debug"
	if got := NeedsRestart(load(), next); got != nil {
		t.Errorf("rules and log level need %v", got)
	}
	next.Listeners[0].Mode = "0660"
	next.Etcd.MaxRequestBytes++
	next.KMS[0].Plugin.Timeout = time.Minute
	next.Cache.Seeds++
	next.Admin = nil
	next.Audit = &Audit{}
	next.Log.Format = "text"
	want := []string{"listeners", "etcd", "kms", "cache", "admin", "audit", "log.format"}
	if diff := cmp.Diff(want, NeedsRestart(load(), next)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestClientLists: a reload applies them to the listener of the same address, and to no other.
func TestClientLists(t *testing.T) {
	secure := func(address, client string) Listener {
		return Listener{Address: address, TLS: &ListenerTLS{CertFile: "c", ClientCAFile: "ca"}, AllowedClients: []string{client}}
	}
	open := Listener{Address: "a:1", TLS: &ListenerTLS{CertFile: "c"}}
	for name, tt := range map[string]struct {
		running, next []Listener
		at            []int
		restart       bool
	}{
		"same":                {[]Listener{secure("a:1", "x")}, []Listener{secure("a:1", "x")}, []int{0}, false},
		"a list":              {[]Listener{secure("a:1", "x"), secure("b:1", "x")}, []Listener{secure("a:1", "x"), secure("b:1", "y")}, []int{0, 1}, false},
		"a list, other order": {[]Listener{secure("a:1", "x"), secure("b:1", "x")}, []Listener{secure("b:1", "y"), secure("a:1", "z")}, []int{1, 0}, true},
		"another address":     {[]Listener{secure("a:1", "x")}, []Listener{secure("b:1", "y")}, []int{-1}, true},
		"one more":            {[]Listener{secure("a:1", "x")}, []Listener{secure("b:1", "x"), secure("a:1", "y")}, []int{1}, true},
		"any port":            {[]Listener{secure("a:0", "x"), secure("a:0", "x")}, []Listener{secure("a:0", "x"), secure("a:0", "y")}, []int{0, 1}, false},
		"any port, gone":      {[]Listener{secure("b:1", "x"), secure("a:0", "x")}, []Listener{secure("a:0", "y")}, []int{-1, -1}, true},
		"without a CA now":    {[]Listener{secure("a:1", "x")}, []Listener{open}, []int{-1}, true},
		"with a CA now":       {[]Listener{open}, []Listener{secure("a:1", "x")}, []int{-1}, true},
	} {
		for i, want := range tt.at {
			if got := SameListener(tt.running, tt.next, i); got != want {
				t.Errorf("%s: %d is %d, want %d", name, i, got, want)
			}
		}
		got := NeedsRestart(&Config{Listeners: tt.running}, &Config{Listeners: tt.next})
		if (len(got) > 0) != tt.restart {
			t.Errorf("%s: needs a restart: %v", name, got)
		}
	}
}
