package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/age"
)

// providerReport is the result of kms check for one provider.
type providerReport struct {
	Name    string `json:"name"`
	Backend string `json:"backend"`
	OK      bool   `json:"ok"`
	KeyID   string `json:"keyID,omitempty"`
	// the operations that the rules need: "generate", "encrypt", "decrypt"
	Tried []string `json:"tried"`
	// of generating or wrapping a key, and unwrapping it
	RoundTripMS float64  `json:"roundTripMilliseconds,omitempty"`
	Findings    []string `json:"findings"` // what does not work
	// what will stop it from working, or makes the loss of the key final
	Warnings []string    `json:"warnings"`
	Key      *keyDetails `json:"key,omitempty"` // if the KMS describes its keys
	// CredentialsExpire is when the session for the KMS calls ends. The proxy renews it before.
	CredentialsExpire time.Time `json:"credentialsExpire,omitzero"`
	// Recipients are the public keys of a provider of kind age.
	Recipients []string `json:"recipients,omitempty"`
	// LastTested is when an identity of a provider of kind age was last tested, now or, as the
	// audit log says, before.
	LastTested time.Time `json:"lastTested,omitzero"`
}

// keyDetails is the description of a key by the KMS.
type keyDetails struct {
	State           string `json:"state"`
	Spec            string `json:"spec,omitempty"`
	ProtectionLevel string `json:"protectionLevel,omitempty"`
	// an account, or the product whose default key this is
	Creator            string    `json:"creator,omitempty"`
	AutomaticRotation  string    `json:"automaticRotation,omitempty"`
	NextRotation       time.Time `json:"nextRotation,omitzero"`
	DeleteAt           time.Time `json:"deleteAt,omitzero"`
	MaterialExpiresAt  time.Time `json:"materialExpiresAt,omitzero"`
	DeletionProtection bool      `json:"deletionProtection"`
	ofService          bool
}

func newKMSCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "test every configured KMS: key state, permissions, a round trip",
		Long: `check gets the state of the key from every configured KMS and tests what the rules need. With a
provider that rules write with, it generates a DEK seed and unwraps it. With a recovery provider, it
wraps a key and unwraps it. Of a provider that rules only read with, it can test the state only. It
connects neither to etcd nor to a running proxy.

A provider of kind age has no KMS: check wraps a key for its recipients and checks the structure of
the result. With --identity, it also unwraps the result, and records the test in the audit log if
there is one.

It warns about a key that will be deleted or expire, that is not protected from deletion or not
rotated, or that has no recovery key, and about a plugin whose key IDs are only numbers. Warnings do
not change the exit code, so that monitoring can tell a key that works from one that does not; with
--strict they do.

With --policy it tests nothing, and prints the least privileges that the proxy needs on all keys of
Alibaba Cloud KMS, as a RAM policy in JSON. It then connects to the KMS only for keys that the
configuration names by an alias.`,
		Args: command.NoArgs,
	}
	path, out := command.ConfigFlag(cmd), command.OutputFlag(cmd)
	timeout := cmd.Flags().Duration("timeout", 30*time.Second, "how long one KMS may take")
	strict := cmd.Flags().Bool("strict", false, "exit with 1 even if there are only warnings")
	identities := command.IdentityFlag(cmd, "with which recovery copies of providers of kind age are unwrapped as a test")
	policy := cmd.Flags().Bool("policy", false, "print the RAM policy that the proxy needs in Alibaba Cloud, and test nothing")
	cmd.RunE = command.Run(func(cmd *cobra.Command, _ []string) error {
		if err := command.Positive("--timeout", *timeout); err != nil {
			return err
		}
		c, err := command.LoadConfig(cmd, *path, config.Checks{}) // each provider is made below
		if err != nil {
			return err
		}
		if len(c.KMS) == 0 {
			return errNoKMS
		}
		calls := command.NewCallLog(c, cmd.ErrOrStderr())
		if *policy {
			return printPolicy(cmd, c.KMS, *timeout, calls.Call)
		}
		ids, err := command.ReadIdentities(cmd, c, *identities)
		if err != nil {
			return err
		}
		reports := make([]providerReport, len(c.KMS))
		var all sync.WaitGroup
		for i, k := range c.KMS {
			all.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), *timeout)
				defer cancel()
				reports[i] = checkProvider(ctx, k, usesOf(c, k), ids, calls)
			})
		}
		all.Wait()
		ok := true
		if err := recordTests(c, cmd.ErrOrStderr(), reports, ids != nil); err != nil {
			return err
		}
		addLastTests(c, cmd.ErrOrStderr(), reports)
		for _, r := range reports {
			ok = ok && r.OK && (!*strict || len(r.Warnings) == 0)
		}
		return out.Report(cmd, ok, map[string]any{"ok": ok, "kms": reports}, func(w io.Writer) {
			for _, r := range reports {
				r.text(w)
			}
		})
	})
	return cmd
}

// printPolicy prints the RAM policy as JSON, which RAM requires, whatever --output says.
func printPolicy(cmd *cobra.Command, providers []config.KMS, timeout time.Duration, observe func(kmsclient.Call)) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	policy, err := provider.RAMPolicy(ctx, providers, observe)
	if err != nil {
		return err
	}
	return command.JSON.Write(cmd.OutOrStdout(), policy, nil)
}

// checkProvider tests one KMS. Every error is a finding.
func checkProvider(ctx context.Context, k config.KMS, u uses, ids *age.Identities, calls *command.CallLog) providerReport {
	b, err := provider.New(k, slog.New(slog.DiscardHandler))
	r := newProviderReport(k.Name, b.Kind)
	switch {
	case err != nil:
		for _, p := range problem.Of(err) {
			r.addFinding("%v", p)
		}
	case b.Offline != nil:
		r.tryOffline(b.Offline, ids)
	case b.Reader != nil: // its keys were read, and there is no KMS
		r.OK = true
	default:
		defer b.Close()
		return checkBackend(ctx, k.Name, b, u, calls.Call)
	}
	return r
}

func newProviderReport(name, kind string) providerReport {
	return providerReport{Name: name, Backend: kind, Tried: []string{}, Findings: []string{}, Warnings: []string{}}
}

// describeTimeout leaves time for the other tests when a KMS does not respond.
const describeTimeout = 3 * time.Second

func checkBackend(ctx context.Context, name string, b *provider.Provider, u uses, observe func(kmsclient.Call)) (r providerReport) {
	r = newProviderReport(name, b.Kind)
	var info *kmsclient.KeyInfo
	defer func() {
		r.OK = len(r.Findings) == 0
		for _, w := range provider.Warnings(info, b.LateCredentials(), u.recovered, time.Now()) {
			r.Warnings = append(r.Warnings, w.Text)
		}
		r.CredentialsExpire = b.CredentialsExpire()
	}()
	client, err := kmsclient.New(kmsclient.Config{Name: name, Backend: b.Service, Timeout: b.Timeout, Observer: observe})
	if err != nil {
		r.addFinding("%v", err)
		return r
	}
	if describe := b.Describe(); describe != nil {
		limited, cancel := context.WithTimeout(ctx, describeTimeout)
		if info, err = provider.Observed(name, observe, describe)(limited); err == nil {
			r.Key = details(info)
		}
		cancel() // an error shows in the status below; a dedicated instance describes no keys
	}
	status, err := client.Status(ctx)
	if err != nil {
		r.addFinding("state: %s", explained(err))
		return r
	}
	r.KeyID = status.KeyID
	if status.Healthz != "ok" {
		r.addFinding("state: the KMS reports that it is not healthy")
	}
	if b.Kind == "plugin" && strings.Trim(r.KeyID, "0123456789") == "" {
		r.Warnings = append(r.Warnings, fmt.Sprintf("the key ID %s is only a number, which another key may have too: the proxy would not notice that the key was replaced, and values of the old key would be lost", r.KeyID))
	}
	start, before := time.Now(), len(r.Findings)
	if u.encrypts {
		r.trySeed(ctx, client)
	}
	if u.copies {
		r.tryCopy(ctx, client)
	}
	if len(r.Tried) > 0 && len(r.Findings) == before {
		r.RoundTripMS = float64(time.Since(start).Microseconds()) / 1000
	}
	return r
}

func details(i *kmsclient.KeyInfo) *keyDetails {
	return &keyDetails{
		State: i.State, Spec: i.Spec, ProtectionLevel: i.ProtectionLevel, Creator: i.Creator, AutomaticRotation: i.AutomaticRotation,
		NextRotation: i.NextRotation, DeleteAt: i.DeleteAt, MaterialExpiresAt: i.MaterialExpiresAt,
		DeletionProtection: i.DeletionProtection == kmsclient.On, ofService: i.OfService,
	}
}

// text prints a report for people.
func (r providerReport) text(w io.Writer) {
	verdict := "ok"
	if !r.OK {
		verdict = "FAILED"
	}
	printable.Fprintf(w, "%s (%s): %s\n", printable.Name(r.Name), r.Backend, verdict)
	if r.Backend == offlineKind && r.OK {
		r.textOffline(w)
	} else if r.KeyID != "" {
		printable.Fprintf(w, "  key ID      %s\n", printable.Name(r.KeyID))
	}
	if r.OK && r.KeyID != "" && r.Backend != offlineKind && len(r.Tried) == 0 {
		printable.Fprintf(w, "  tested      its state only: the rules only read with it\n")
	}
	if r.RoundTripMS > 0 {
		printable.Fprintf(w, "  round trip  %.1f ms\n", r.RoundTripMS)
	}
	if k := r.Key; k != nil {
		protection := "off: the key can be scheduled for deletion"
		if k.DeletionProtection {
			protection = "on"
		}
		printable.Fprintf(w, "  key state   %s\n  rotation    %s\n  deletion protection  %s\n", k.State, cmp.Or(k.AutomaticRotation, "none"), protection)
	}
	if !r.CredentialsExpire.IsZero() {
		printable.Fprintf(w, "  credentials expire   %s, and are renewed before\n", r.CredentialsExpire.Format(time.RFC3339))
	}
	for _, f := range r.Findings {
		printable.Fprintf(w, "  - %s\n", f)
	}
	for _, f := range r.Warnings {
		printable.Fprintf(w, "  - warning: %s\n", f)
	}
}
