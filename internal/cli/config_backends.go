package cli

import (
	"errors"
	"log/slog"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
)

// backendChecks are those that a part of the configuration gets from what is made of it, such as of the permission of a key file. warn may be nil.
func backendChecks(warn func(config.Problem)) config.Checks {
	return config.Checks{KMS: backendProblems, Audit: auditProblems, Warn: warn}
}

// backendProblems makes the backend of k and lets it go again. Nothing is connected to.
func backendProblems(k config.KMS) []config.Problem {
	b, err := newBackend(k, slog.New(slog.DiscardHandler))
	if err == nil {
		b.close()
		return nil
	}
	switch {
	case k.Alibaba != nil:
		ps := problemsOf(err, "alibaba", "docs/guides/alibaba-cloud.md says what each field takes")
		for i := range ps {
			if rest, ok := strings.CutPrefix(ps[i].Text, "credentials: "); ok {
				ps[i].Path, ps[i].Text = "alibaba.credentials", rest
			}
		}
		return ps
	case k.Plugin != nil:
		return problemsOf(err, "plugin.endpoint", "write unix:///path/to/socket")
	case k.Local != nil:
		return problemsOf(err, "local.keyFile", "etcd-kms-proxy kms new-local-key makes a key file")
	case k.Kubernetes != nil:
		return problemsOf(err, "kubernetes.keyFile", kubernetesForm("").Empty)
	}
	return problemsOf(err, "", "")
}

// auditProblems checks the key of a. It opens no log, which a proxy may be writing.
func auditProblems(a config.Audit) []config.Problem {
	if a.KeyFile == "" {
		return nil
	}
	_, err := auditlog.LoadKey(a.KeyFile)
	return problemsOf(err, "keyFile", "head -c 32 /dev/urandom makes a key")
}

// problemsOf makes a problem of each error that err joins. One that gives advice has that as its hint.
func problemsOf(err error, path, hint string) []config.Problem {
	if err == nil {
		return nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok { // this error itself, and not one that it wraps
		var ps []config.Problem
		for _, e := range joined.Unwrap() {
			ps = append(ps, problemsOf(e, path, hint)...)
		}
		return ps
	}
	if inner := errors.Unwrap(err); inner != nil {
		// "credentials: " before two problems stands before each.
		if before, ok := strings.CutSuffix(err.Error(), inner.Error()); ok {
			ps := problemsOf(inner, path, hint)
			for i := range ps {
				ps[i].Text = before + ps[i].Text
			}
			return ps
		}
	}
	p := config.Problem{Path: path, Text: err.Error(), Hint: hint}
	if a, ok := err.(interface{ Advice() string }); ok {
		p.Text, p.Hint = strings.TrimSuffix(p.Text, ": "+a.Advice()), a.Advice()
	}
	return []config.Problem{p}
}
