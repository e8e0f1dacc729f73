package config

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

// providerName has no colon, which would end the name in every stored value.
var providerName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$`)

// CheckProviderName says what is wrong with the name of a KMS provider, and what to do; both are
// empty if it is good.
func CheckProviderName(name string) (text, hint string) {
	switch {
	case name == Plaintext:
		return fmt.Sprintf("%q is what rules call not encrypting", name), "choose another name"
	case strings.ContainsRune(name, ':'):
		return fmt.Sprintf("%q has a colon, which ends the name in every stored value", name), "choose a name without one"
	case !providerName.MatchString(name):
		return fmt.Sprintf("%q is not a provider's name", name), "use letters, digits, - _ and . between letters or digits, at most 63"
	}
	return "", ""
}

func (v *validator) kms(providers []KMS) {
	seen := make(map[string]int)
	for i, k := range providers {
		at := fmt.Sprintf("kms[%d]", i)
		first, twice := seen[k.Name]
		if text, hint := CheckProviderName(k.Name); text != "" {
			v.report(at+".name", hint, "%s", text)
		} else if twice {
			v.report(at+".name", "give each provider a name of its own", "%q is the name of kms[%d] too", k.Name, first)
		} else {
			seen[k.Name] = i
		}
		v.duration(at+".pollInterval", k.PollInterval, time.Second)
		v.duration(at+".seedMaxAge", k.SeedMaxAge, time.Minute)
		if k.SeedMaxSeals < 1 {
			v.report(at+".seedMaxSeals", "the default is 4294967296", "%d is less than 1", k.SeedMaxSeals)
		}
		var backends []string
		for _, b := range []string{"alibaba", "plugin", "local", "kubernetes", "age"} {
			if v.present(at + "." + b) {
				backends = append(backends, b)
			}
		}
		if len(backends) != 1 {
			text := "has no backend"
			if len(backends) > 1 {
				text = "has more than one backend: " + strings.Join(backends, " and ")
			}
			v.report(at, "give it exactly one of alibaba, plugin, local, kubernetes and age", "%s", text)
		}
		if k.Plugin != nil && k.Plugin.Endpoint != "" {
			v.socket(at+".plugin.endpoint", k.Plugin.Endpoint)
			v.duration(at+".plugin.timeout", k.Plugin.Timeout, time.Millisecond)
		}
		if k.Alibaba != nil {
			v.alibaba(at+".alibaba", k.Alibaba)
		}
		if k.Kubernetes != nil {
			v.kubernetes(at, k.Kubernetes)
		}
		if k.Age != nil {
			v.age(at, k)
		}
	}
}

func (v *validator) alibaba(at string, a *Alibaba) {
	v.certPool(at+".caFile", a.CAFile)
	v.httpsHost(at+".endpoint", a.Endpoint)
	if arn, ok := strings.CutPrefix(a.KeyID, "acs:kms:"); ok && !strings.HasPrefix(arn, a.Region+":") && a.Region != "" {
		v.report(at+".keyID", "write the key's own region in region", "%q is not of region %q", a.KeyID, a.Region)
	}
	v.alibabaCredentials(at+".credentials", &a.Credentials)
}

// kubernetes checks kms[i] of that kind, at.
func (v *validator) kubernetes(at string, k *Kubernetes) {
	if k.Type != "" {
		v.oneOf(at+".kubernetes.type", k.Type, "aescbc", "aesgcm", "secretbox")
	}
	v.seedless(at, "kubernetes, whose keys are used as they are")
}

// seedless refuses the fields of kms[i], at, that are about a KMS and its DEK seeds.
func (v *validator) seedless(at, kind string) {
	for _, f := range []string{"pollInterval", "seedMaxAge", "seedMaxSeals"} {
		if v.present(at + "." + f) {
			v.report(at+"."+f, "remove it", "has no effect with %s", kind)
		}
	}
}

// age checks kms[i] of that kind, at. What is no recipient is found by what uses them.
func (v *validator) age(at string, k KMS) {
	if len(k.Age.Recipients) == 0 && k.Age.RecipientsFile == "" {
		v.report(at+".age", "write recipients: [age1…], which age-keygen prints, or name a recipientsFile", "has no recipients")
	}
	if k.Name != "" && !copyName.MatchString(k.Name) {
		v.report(at+".name", copyNameHint, copyNameText, k.Name)
	}
	v.seedless(at, "age, which has no KMS")
}

// writers refuses providers that are for reading only where r writes with them.
func (v *validator) writers(at string, r Rule, providers []KMS) {
	for _, k := range providers {
		if k.Age != nil {
			const text, hint = "provider %q is of kind age, whose private keys are offline: it only wraps recovery copies", "name it in recovery"
			if k.Name == r.WriteWith {
				v.report(at+".writeWith", hint+", and in writeWith a provider with a key", text, k.Name)
			}
			if i := slices.Index(r.ReadWith, k.Name); i >= 0 {
				v.report(fmt.Sprintf("%s.readWith[%d]", at, i), hint, text, k.Name)
			}
		}
		if k.Kubernetes == nil {
			continue
		}
		const text = "provider %q is of kind kubernetes, which only decrypts values"
		if k.Name == r.WriteWith {
			v.report(at+".writeWith", "name it in readWith, and in writeWith another provider, for new values and for reencrypt", text, k.Name)
		}
		if i := slices.Index(r.Recovery, k.Name); i >= 0 {
			v.report(fmt.Sprintf("%s.recovery[%d]", at, i), "name it in readWith", text, k.Name)
		}
	}
}
