{{- define "plimsoll.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "plimsoll.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "plimsoll.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "plimsoll.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "plimsoll.registryName" -}}
{{- printf "%s-registry" (include "plimsoll.fullname" .) }}
{{- end }}

{{- define "plimsoll.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "plimsoll.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name is needed where serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- /* Labels of every object. */ -}}
{{- define "plimsoll.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "plimsoll.podLabels" . }}
{{- end }}

{{- define "plimsoll.operatorSelector" -}}
app.kubernetes.io/name: {{ include "plimsoll.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "plimsoll.registrySelector" -}}
app.kubernetes.io/name: {{ include "plimsoll.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: registry
{{- end }}

{{- /* Labels of pods beyond the selector's: none that a new chart version changes, or it would restart what it did not touch. */ -}}
{{- define "plimsoll.podLabels" -}}
app.kubernetes.io/part-of: plimsoll
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* The reference of an image: include "plimsoll.image" (list . "operator"). */ -}}
{{- define "plimsoll.image" -}}
{{- $root := index . 0 }}
{{- $name := index . 1 }}
{{- $images := $root.Values.images }}
{{- default (printf "%s/%s:%s" $images.repository $name (default $root.Chart.AppVersion $images.tag)) (get $images $name) }}
{{- end }}

{{- define "plimsoll.imagePullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* What the restricted Pod Security Standard asks of a pod. */ -}}
{{- define "plimsoll.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "plimsoll.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* Refuses values that contradict each other. */ -}}
{{- define "plimsoll.validate" -}}
{{- $registry := .Values.registry }}
{{- if and $registry.internal.enabled $registry.external.repository }}
{{- fail "registry.external.repository is set while the internal registry is on: add registry.internal.enabled=false" }}
{{- end }}
{{- if not (or $registry.internal.enabled $registry.external.repository) }}
{{- fail "no registry for artifacts: set registry.external.repository, or registry.internal.enabled=true" }}
{{- end }}
{{- end }}
